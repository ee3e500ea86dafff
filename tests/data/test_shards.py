"""Clips in tar shards are the clips that the files are, wherever the shards lie."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from vdm.data.check import check
from vdm.data.dataset import ClipDataset
from vdm.data.mini_something import render_clip
from vdm.data.settings import DataConfig
from vdm.data.shards import expand, find_shards
from vdm.data.ssv2 import ClipFile
from vdm.data.video import UnreadableClip, read_clip, to_video, write_video
from vdm.errors import UserError

Command = Callable[..., Any]
CONFIG = DataConfig(format="webdataset", height=32, width=32, min_frames=4, max_frames=6, validation_clips=4)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same twenty clips as files with texts and as two shards."""
    root = tmp_path_factory.mktemp("shards")
    (root / "files").mkdir()
    (root / "tars").mkdir()
    for shard in range(2):
        with tarfile.open(root / "tars" / f"{shard:03d}.tar", "w") as tar:
            for i in range(10 * shard, 10 * shard + 10):
                clip = render_clip(i, seed=0, height=32, width=32, num_frames=8, fps=8)
                path = root / "files" / f"clip{i}.mp4"
                write_video(path, clip.frames, fps=8)
                path.with_suffix(".txt").write_text(clip.label)
                add(tar, path.name, path.read_bytes())
                entry = {"label": clip.label, "template": clip.template, "placeholders": list(clip.placeholders)}
                if i % 2:
                    add(tar, f"clip{i}.json", json.dumps(entry).encode())
                else:
                    add(tar, f"clip{i}.txt", f"{clip.label}\n".encode())
    return root / "files", root / "tars"


def dataset(config: DataConfig, root: object, split: Any = "train") -> ClipDataset:
    return ClipDataset(replace(config, root=str(root)), split=split, seed=0, batch_size=4)


@pytest.mark.parametrize("pattern", ["", "/{000..001}.tar"])
def test_shards_give_what_the_files_give(places: tuple[Path, Path], pattern: str) -> None:
    files, tars = places
    packed = dataset(CONFIG, f"{tars}{pattern}")
    plain = dataset(replace(CONFIG, format="folder"), files)
    assert len(packed) == len(plain) == 18
    assert {packed.source.id(i) for i in range(18)} == {plain.source.id(i) for i in range(18)}
    where = {plain.source.id(i): i for i in range(18)}
    for position in range(18):
        sample, cut = packed[position], packed._cut_at(position)
        loaded = plain.source.load(where[sample["id"]], cut)
        assert torch.equal(sample["video"], to_video(loaded.frames))
        assert sample["caption"] == loaded.words.caption
    held_out = dataset(CONFIG, tars, "validation")
    assert len(held_out) == 2 and held_out[0]["video"].shape == (3, 6, 32, 32)


def test_templates_come_with_json(places: tuple[Path, Path]) -> None:
    clips = find_shards(str(places[1]), "train")
    assert {bool(clip.template) for clip in clips if int(clip.id.removeprefix("clip")) % 2} == {True}
    assert {bool(clip.template) for clip in clips if int(clip.id.removeprefix("clip")) % 2 == 0} == {False}


def test_any_file_system_will_do(places: tuple[Path, Path]) -> None:
    memory = fsspec.filesystem("memory")
    for shard in ("000", "001"):
        memory.pipe(f"/far/{shard}.tar", (places[1] / f"{shard}.tar").read_bytes())
    far, near = dataset(CONFIG, "memory://far/{000..001}.tar"), dataset(CONFIG, places[1])
    assert all(torch.equal(far[i]["video"], near[i]["video"]) for i in (0, 7, 30))


def test_shards_are_checked_and_viewed(command: Command, places: tuple[Path, Path], tmp_path: Path) -> None:
    assert command("vdm", "data", "check", places[1]).code == 0
    page = tmp_path / "view.html"
    small = ("data.height=32", "data.width=32", "data.max_frames=16")
    shard = places[1] / "000.tar"
    assert command("vdm", "data", "view", shard, "--output", page, "--num_clips", 1, *small).code == 0
    assert page.is_file()


def test_damage_is_named(places: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        good = places[0] / "clip0.mp4"
        for name in "abcd":
            add(tar, f"{name}.mp4", good.read_bytes() if name != "b" else b"no video")
            if name != "c":
                add(tar, f"{name}.txt", b"a clip")
    found = {one.id: one for one in check(tmp_path / "bad.tar")}
    assert found["b"].bad and found["c"].problem == "it has no caption"
    assert f"{tmp_path / 'bad.tar'}:b.mp4" == found["b"].file
    assert found["a"].problem == "short: 1.00 seconds"


@pytest.mark.parametrize(
    ("root", "sentence"),
    [
        ("PLACE/nowhere.tar", "shard .*nowhere.tar cannot be read"),
        ("PLACE/empty", "holds no .tar"),
        ("PLACE/text.tar", "text.tar is no plain tar"),
        ("PLACE/zipped.tar", "zipped.tar is no plain tar"),
        ("PLACE/none.tar", "the train split of .* is empty: of 0 clips"),
        ("nonsense://x/{0..1}.tar", "shard nonsense://x/0.tar cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, root: str, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("not a tar" * 100)
    tarfile.open(tmp_path / "none.tar", "w").close()
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        add(tar, "a.txt", b"a" * 3000)
    with pytest.raises(UserError, match=sentence):
        find_shards(root.replace("PLACE", str(tmp_path)), "train")


def test_two_clips_of_one_name_are_refused(places: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).write_bytes((places[1] / "000.tar").read_bytes())
    with pytest.raises(UserError, match="both hold a clip clip0; give each its own name"):
        find_shards(str(tmp_path), "train")


def test_patterns() -> None:
    assert expand("s3://b/{08..11}-{0..1}.tar") == [
        f"s3://b/{n}-{m}.tar" for n in ("08", "09", "10", "11") for m in (0, 1)
    ]
    assert expand("https://host/a.tar") == ["https://host/a.tar"]


def test_a_shard_that_goes_away_later_is_a_bad_clip(places: tuple[Path, Path], tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    shard.write_bytes((places[1] / "000.tar").read_bytes())
    clips = dataset(replace(CONFIG, max_bad_share=1.0), shard)
    one: ClipFile = clips.source.clips[0]  # type: ignore[attr-defined]
    shard.unlink()
    with pytest.raises(UnreadableClip, match="0.tar:clip"):
        read_clip(one.path, fps=8, num_frames=4)
