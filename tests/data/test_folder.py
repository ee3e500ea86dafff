from __future__ import annotations

import os

import pytest

from vdm.data.folder import find_folder
from vdm.data.ssv2 import validation_ids
from vdm.data.subset import choose
from vdm.errors import UserError


def put(folder, name: str, text: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x")
    if text is not None:
        (folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")


def both(folder):
    return sorted(find_folder(folder, "train") + find_folder(folder, "validation"), key=lambda clip: clip.id)


def test_videos_with_captions_beside_them_whatever_their_extension(tmp_path):
    names = ["a.mp4", "b.webm", "c.MKV", "d.avi"]
    for name in names:
        put(tmp_path, name, f" a caption for {name}\n")
    put(tmp_path, "notes.md", "not a video")
    put(tmp_path, ".hidden.mp4", "no")
    put(tmp_path / "videos", "e.mp4", "subfolders are not searched")
    assert [(clip.path.name, clip.caption, clip.problem) for clip in both(tmp_path)] == [
        (name, f"a caption for {name}", "") for name in names
    ]


def test_validation_is_the_same_tenth_as_everywhere(tmp_path):
    for number in range(30):
        put(tmp_path, f"{number}.mp4", "x")
    train = {clip.id for clip in find_folder(tmp_path, "train")}
    validation = {clip.id for clip in find_folder(tmp_path, "validation")}
    assert validation == validation_ids(str(number) for number in range(30)) and len(validation) == 3
    assert train.isdisjoint(validation) and len(train) == 27


def test_a_name_that_is_no_utf8_is_drawn_among_the_others(tmp_path):
    for name in ("a.mp4", "b.mp4", os.fsdecode(b"caf\xe9.mp4")):
        put(tmp_path, name, "x")
    clips = both(tmp_path)
    assert len(choose(clips, num_clips=2)) == 2 and choose(clips, num_clips=3) == clips


def test_videos_without_a_usable_caption_are_marked(tmp_path):
    put(tmp_path, "a.mp4", "good")
    put(tmp_path, "b.mp4", None)
    put(tmp_path, "c.mp4", " \n")
    put(tmp_path, "d.mp4", "x")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xff")
    problems = {clip.id: clip.problem for clip in both(tmp_path)}
    assert problems["a"] == ""
    assert problems["b"] == "no caption file b.txt"
    assert problems["c"] == "its caption file c.txt is empty"
    assert problems["d"].startswith("its caption file d.txt cannot be read")


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match=r"does not exist; set data\.root"):
        find_folder(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="holds no video"):
        find_folder(tmp_path, "train")
    put(tmp_path, "a.mp4", "only one")
    assert len(find_folder(tmp_path, "validation")) == 1
    with pytest.raises(UserError, match="train split .* is empty"):
        find_folder(tmp_path, "train")
