"""Rows of clips: the same whatever the batch, made once, and of the clips as they are now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import SHAPE, frames, samples, write_lines
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from vdm.data.video import write_video
from vdm.evaluation import altered, extract
from vdm.evaluation.cache import load_rows, machinery, save_rows
from vdm.evaluation.clips import (
    generated_clips,
    read_generated,
)
from vdm.evaluation.extract import Opened, Task
from vdm.evaluation.per_clip import nearest


class Counting:
    """Rows that say which clips they are of, and how often that was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def rows(self, clips: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        self.asked += len(clips)
        marks = [float(prompt.split()[1]) for prompt in prompts]
        return np.stack([clips.reshape(len(clips), -1).mean(1), np.array(marks)], axis=1)


def extracted(folder: Path, cache: Path, counting: Counting) -> extract.Extracted:
    clips, shape = generated_clips(folder)
    looks = {"": altered.as_it_is, "frozen": altered.frozen}
    return extract.extract(Task("x", clips, read_generated, looks), shape, {"a": Opened(counting.rows)}, cache=cache)


def test_rows_do_not_depend_on_the_batch_and_are_not_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "samples"
    samples(folder, 5)
    (folder / "00003.mp4").write_bytes(b"no video")
    found = []
    for size in (1, 3):
        counting = Counting()
        monkeypatch.setattr(extract, "BATCH", size)
        found.append(extracted(folder, tmp_path / f"cache-{size}", counting))
        assert counting.asked == 8, "four good clips, two looks"
    one, three = found
    assert [clip.id for clip in one.clips] == ["00000.mp4", "00001.mp4", "00002.mp4", "00004.mp4"]
    assert [(clip.id, told) for clip, told in one.problems] == [("00003.mp4", one.problems[0][1])]
    assert one.problems[0][1].startswith("00003.mp4 cannot be read")
    assert all(np.array_equal(one.rows[key], three.rows[key]) for key in one.rows)
    assert one.side("a", "frozen").rows[:, 1].tolist() == [0, 1, 2, 4]
    first = read_generated(one.clips[2], SHAPE)
    assert one.side("a").rows[2, 0] == first.mean() and one.side("a", "frozen").rows[2, 0] == first[0].mean()

    counting = Counting()
    again = extracted(folder, tmp_path / "cache-1", counting)
    assert counting.asked == 0 and all(np.array_equal(one.rows[key], again.rows[key]) for key in one.rows)
    write_video(folder / "00001.mp4", frames(77), fps=8.0)
    changed = extracted(folder, tmp_path / "cache-1", counting)
    assert counting.asked == 2 and changed.side("a").rows[1, 0] == read_generated(changed.clips[1], SHAPE).mean()
    for file in (tmp_path / "cache-1").rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert np.array_equal(extracted(folder, tmp_path / "cache-1", counting).side("a").rows, changed.side("a").rows)
    assert counting.asked == 10


def test_rows_are_kept_for_what_they_depend_on_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache, counting = tmp_path / "samples", tmp_path / "cache", Counting()
    lines = samples(folder, 3)
    extracted(folder, cache, counting)
    for name, other, count in (
        ("NOISE", 7.0, 3), ("SEED", 8, 3), ("source_sha256", lambda: "other code", 6),
        ("machinery", lambda: {"torch": "0.1"}, 6),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(extract, name, other)
            counting.asked = 0
            extracted(folder, cache, counting)
            assert counting.asked == count, f"{name}: looks that are drawn by it, or all"
    counting.asked = 0
    extracted(folder, cache, counting)
    assert counting.asked == 0
    (folder / "00001.mp4").replace(folder / "renamed.mp4")
    write_lines(folder, [lines[0], {**lines[1], "file": "renamed.mp4"}, lines[2]])
    extracted(folder, cache, counting)
    assert counting.asked == 1, "alterations are drawn for a clip's name"


def test_what_computes_is_named() -> None:
    found = machinery()
    assert (found["device"], found["torch"], found["numpy"]) == ("cpu", torch.__version__, np.__version__)
    assert {"av", "cv2", "open_clip"} < set(found)


KEYS, ROWS = np.arange(96, dtype=np.uint8).reshape(3, 32), np.ones((3, 2), dtype=np.float32)


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        (KEYS, ROWS[:2]), (KEYS[:, :31], ROWS), (KEYS, ROWS[:, 0]), (KEYS, ROWS[:, :1]), (KEYS, ROWS * np.nan),
        (KEYS[0], ROWS), (KEYS, ROWS.astype(np.float64)),
    ],
)  # fmt: skip
def test_a_file_of_rows_that_is_not_as_it_was_written_is_left_alone(
    tmp_path: Path, keys: np.ndarray, rows: np.ndarray
) -> None:
    good = {key.tobytes().hex(): row for key, row in zip(KEYS, ROWS, strict=True)}
    save_rows(tmp_path, good, name="rank-0")
    found = load_rows(tmp_path)
    assert found.keys() == good.keys() and all(np.array_equal(found[key], good[key]) for key in good)
    with safe_open(tmp_path / "rank-0.safetensors", framework="np") as file:
        told = file.metadata()
    for metadata in (told, None):
        content = {"keys": np.ascontiguousarray(keys), "rows": np.ascontiguousarray(rows)}
        save_file(content, tmp_path / "rank-0.safetensors", metadata=metadata)
        assert load_rows(tmp_path) == {}
    save_file({"rows": ROWS}, tmp_path / "rank-0.safetensors", metadata=told)
    assert load_rows(tmp_path) == {}


@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 100))
def test_the_nearest_is_that_of_all_distances(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 4)).astype(np.float32), rng.normal(size=(m, 4)).astype(np.float32)
    apart = np.sqrt(((x[:, None].astype(float) - y[None]) ** 2).mean(2))
    places, distances = nearest(x, y)
    assert np.array_equal(places, apart.argmin(1)) and np.allclose(distances, apart.min(1))
    within = np.sqrt(((y[:, None].astype(float) - y[None]) ** 2).mean(2)) + np.diag(np.full(m, np.inf))
    places, distances = nearest(y, y, itself=True)
    assert np.array_equal(places, within.argmin(1)) and np.allclose(distances, within.min(1))
