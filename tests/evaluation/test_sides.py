"""Both sides of an evaluation: what is listed, what is refused, what is read; and clips made worse."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from folders import SHAPE, frames, samples, write_lines
from hypothesis import given
from hypothesis import strategies as st

from vdm.data.captions import caption
from vdm.data.mini_something import write_ssv2
from vdm.data.video import write_video
from vdm.errors import UserError
from vdm.evaluation import altered
from vdm.evaluation.clips import (
    BadClip,
    Clip,
    Shape,
    generated_clips,
    read_generated,
    read_reference,
    reference_clips,
)


def test_a_sample_folder_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    lines = samples(tmp_path)
    write_lines(tmp_path, lines[::-1])
    clips, shape = generated_clips(tmp_path)
    assert [clip.id for clip in clips] == ["00000.mp4", "00001.mp4", "00002.mp4"] and shape == SHAPE
    assert [(clip.prompt, clip.seed) for clip in clips] == [(f"prompt {i}", i) for i in range(3)]
    assert clips[1].sha256 == hashlib.sha256((tmp_path / "00001.mp4").read_bytes()).hexdigest()
    assert np.array_equal(read_generated(clips[0], shape).shape, (4, 32, 48, 3))


def bad_folder(folder: Path, kind: str) -> None:
    lines = samples(folder)
    if kind == "no list":
        (folder / "samples.jsonl").unlink()
    elif kind == "no lines":
        write_lines(folder, [])
    elif kind == "not JSON":
        (folder / "samples.jsonl").write_text("{\n")
    elif kind == "no prompt":
        write_lines(folder, [{**lines[0], "prompt": None}])
    elif kind == "no frame":
        write_lines(folder, [{**lines[0], "num_frames": 0}])
    elif kind == "blank prompt":
        write_lines(folder, [{**lines[0], "prompt": " "}])
    elif kind == "twice":
        write_lines(folder, [*lines, lines[1]])
    elif kind == "gone":
        (folder / "00001.mp4").unlink()
    elif kind in ("elsewhere", "absolute"):
        (folder.parent / "a.mp4").write_bytes((folder / "00001.mp4").read_bytes())
        name = "../a.mp4" if kind == "elsewhere" else str(folder.parent / "a.mp4")
        write_lines(folder, [*lines, {**lines[1], "file": name, "seed": 9}])
    elif kind == "stray":
        write_lines(folder, lines[:2])
    elif kind == "shapes":
        write_lines(folder, [*lines[:2], {**lines[2], "fps": 24.0}])
    else:
        write_lines(folder, [*lines[:2], {**lines[2], "prompt": "prompt 0", "seed": 0}])


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("fps", float("inf"), "line 1 of .* has inf fps, and at most 1000 can be read"),
        ("fps", float("nan"), "line 1 of .* has fps nan, which no clip has"),
        ("fps", 10**400, "line 1 of .* fps, and at most 1000 can be read"),
        ("num_frames", 10**15, "line 1 of .* pixels in all its frames, and at most 1073741824"),
        ("height", 10**9, "line 1 of .* pixels in all its frames, and at most 1073741824"),
    ],
    ids=["infinite", "nan", "vast", "long", "high"],
)
def test_numbers_that_no_clip_has_are_refused(tmp_path: Path, key: str, value: float, sentence: str) -> None:
    lines = samples(tmp_path / "samples", 1)
    write_lines(tmp_path / "samples", [{**lines[0], key: value}])
    with pytest.raises(UserError, match=sentence):
        generated_clips(tmp_path / "samples")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("no list", "has no samples.jsonl that can be read .* give --generated a folder that sample.py wrote"),
        ("no lines", "samples.jsonl lists no clip"),
        ("not JSON", "line 1 of .* is not valid JSON"),
        ("no prompt", "line 1 of .* has no prompt as sample.py writes it"),
        ("no frame", "has num_frames 0, which no clip has"),
        ("blank prompt", "has prompt ' ', which no clip has"),
        ("twice", "line 4 of .* names 00001.mp4 a second time"),
        ("gone", "line 2 of .* names 00001.mp4, which is not in"),
        ("elsewhere", "line 4 of .* names ../a.mp4, which is not a file's bare name"),
        ("absolute", "line 4 of .* names /.*a.mp4, which is not a file's bare name"),
        (
            "stray",
            "holds 00002.mp4 without a prompt in samples.jsonl, as where an earlier sample.py .* an empty folder",
        ),
        ("shapes", "00002.mp4 in .* has 4 frames of 48x32 at 24 fps, but 00000.mp4 4 frames of 48x32 at 8 fps"),
        ("same prompt and seed", "00000.mp4, 00002.mp4 in .* have the same prompt and seed"),
    ],
)
def test_what_is_wrong_with_a_sample_folder_is_said(tmp_path: Path, kind: str, sentence: str) -> None:
    bad_folder(tmp_path / "samples", kind)
    with pytest.raises(UserError, match=sentence):
        generated_clips(tmp_path / "samples")


def test_a_model_that_makes_one_clip_of_all_prompts_can_be_evaluated(tmp_path: Path) -> None:
    samples(tmp_path)
    (tmp_path / "00002.mp4").write_bytes((tmp_path / "00000.mp4").read_bytes())
    clips, _ = generated_clips(tmp_path)
    assert len(clips) == 3 and clips[0].sha256 == clips[2].sha256


def clip_of(path: Path) -> Clip:
    return Clip(path.name, path, "a prompt", "")


def test_files_that_are_not_what_is_said_of_them_are_bad_clips(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    for written, fps, sentence in (
        (frames(0, num_frames=3), 8.0, "a.mp4 has 3 frames, and not 4 as samples.jsonl says"),
        (frames(0, num_frames=5), 8.0, "a.mp4 has 5 frames, and not 4"),
        (frames(0), 4.0, "a.mp4 does not run at 8 fps"),
        (frames(0), 24.0, "a.mp4 is too short for 4 frames at 8 fps"),
        (frames(0, height=48), 8.0, "a.mp4 is 48x48, and not 48x32"),
    ):
        write_video(path, written, fps=fps)
        with pytest.raises(BadClip, match=sentence):
            read_generated(clip_of(path), SHAPE)
    path.write_bytes(b"no video")
    with pytest.raises(BadClip, match="a.mp4 cannot be read: "):
        read_generated(clip_of(path), SHAPE)


def test_an_odd_size_is_read_without_the_edge_that_the_file_has(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames(0, height=31, width=47), fps=8.0)
    assert read_generated(clip_of(tmp_path / "a.mp4"), Shape(4, 8.0, 31, 47)).shape == (4, 31, 47, 3)


def test_a_reference_clip_is_read_as_those_generated_are(tmp_path: Path) -> None:
    steps = np.repeat(np.arange(32, dtype=np.uint8) * 8, 64 * 96 * 3).reshape(32, 64, 96, 3)
    write_video(tmp_path / "a.mp4", steps, fps=24.0)  # one and a third seconds; the middle half second is wanted
    found = read_reference(clip_of(tmp_path / "a.mp4"), SHAPE)
    assert found.shape == (4, 32, 48, 3)
    assert np.allclose(found.mean((1, 2, 3)), [88, 112, 136, 160], atol=8.1), "every third frame, about the middle"
    write_video(tmp_path / "c.mp4", frames(3), fps=8.0)
    same = clip_of(tmp_path / "c.mp4")
    assert np.array_equal(read_reference(same, SHAPE), read_generated(same, SHAPE)), "the same file, the same frames"
    write_video(tmp_path / "d.mp4", steps, fps=6.0)
    with pytest.raises(BadClip, match="d.mp4 has 6 frames a second, and 8 are needed"):
        read_reference(clip_of(tmp_path / "d.mp4"), SHAPE)
    write_video(tmp_path / "b.mp4", steps[:6], fps=24.0)
    with pytest.raises(BadClip, match="b.mp4 is too short for 4 frames at 8 fps"):
        read_reference(clip_of(tmp_path / "b.mp4"), SHAPE)


def test_the_reference_is_all_clips_or_a_split_or_so_many_by_hash(tmp_path: Path) -> None:
    root = tmp_path / "ref"
    write_ssv2(root, num_clips=20, size=16, num_frames=2, fps=8.0, seed=0)
    clips, notes = reference_clips(root)
    assert (len(clips), notes) == (20, []) and [clip.id for clip in clips] == sorted(clip.id for clip in clips)
    held_out = {entry["id"] for entry in json.loads((root / "validation.json").read_text())}
    assert {clip.id for clip in reference_clips(root, split="validation")[0]} == held_out
    few = reference_clips(root, most=5)[0]
    by_hash = sorted((hashlib.sha256(clip.id.encode()).hexdigest(), clip.id) for clip in clips)
    assert {clip.id for clip in few} == {name for _, name in by_hash[:5]}
    assert clips[0].template and clips[0].prompt == caption(clips[0].template, clips[0].placeholders)

    folder = root / "20bn-something-something-v2"
    (folder / f"{clips[0].id}.mp4").unlink()
    (folder / f"{clips[2].id}.mp4").write_bytes((folder / f"{clips[1].id}.mp4").read_bytes())
    left, notes = reference_clips(root)
    assert len(left) == 18
    assert notes == [
        f"{clips[0].id} was left out: no file",
        f"{clips[2].id} was left out: another clip has the same bytes",
    ]
    with pytest.raises(UserError, match="has 1 usable clips"):
        reference_clips(root, most=1)

    for name in {entry["id"] for entry in json.loads((root / "train.json").read_text())}:
        (folder / f"{name}.mp4").unlink(missing_ok=True)
    left, notes = reference_clips(root)
    assert {clip.id for clip in left} == held_out & {path.stem for path in folder.iterdir()}
    assert notes[0] == "the train split was left out: it has no files"


@given(st.integers(2, 6), st.text(max_size=5))
def test_alterations_depend_on_the_name_alone_and_change_what_they_should(num_frames: int, name: str) -> None:
    clip = frames(1, num_frames=num_frames, height=12, width=16)
    before = clip.copy()
    for alter in altered.ALTERATIONS.values():
        assert np.array_equal(alter(clip, name), alter(clip, name))
        assert alter(clip, name).shape == clip.shape and alter(clip, name).dtype == np.uint8
    assert np.array_equal(clip, before)
    assert (altered.frozen(clip, name) == clip[0]).all()
    mixed = altered.shuffled(clip, name)
    assert not np.array_equal(mixed, clip)
    assert sorted(frame.tobytes() for frame in mixed) == sorted(frame.tobytes() for frame in clip)
    assert 20 < np.abs(altered.noisy(clip, name).astype(int) - clip).mean() < 50
    assert np.array_equal(altered.shuffled(clip[:1], name), clip[:1])
