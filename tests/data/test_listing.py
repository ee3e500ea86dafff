"""Clips by a list: jsonl and csv, what they may say, and what is wrong with them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from vdm.data.dataset import ClipDataset
from vdm.data.listing import find_listed
from vdm.data.mini_something import render_clip
from vdm.data.settings import DataConfig
from vdm.data.video import write_video
from vdm.errors import UserError


def listed(root: Path, kind: str, count: int = 10) -> Path:
    """A list of clips in a subfolder, the last of which is not there."""
    entries = [{"file": f"clips/{i}.mp4", "caption": f"clip {i}, with a comma"} for i in range(count)]
    (root / "clips").mkdir()
    for i in range(count - 1):
        (root / "clips" / f"{i}.mp4").write_bytes(b"")
    path = root / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["caption", "file"])
            writer.writeheader()
            writer.writerows(entries)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("where", ["the list", "its folder"])
def test_a_list_is_read(tmp_path: Path, kind: str, where: str) -> None:
    path = listed(tmp_path, kind)
    root = path if where == "the list" else tmp_path
    train, held_out = (find_listed(root, split, kind=kind) for split in ("train", "validation"))  # type: ignore[arg-type]
    assert len(train) == 9 and len(held_out) == 1
    clips = {clip.id: clip for clip in (*train, *held_out)}
    assert clips.keys() == {f"clips/{i}" for i in range(10)}
    assert clips["clips/3"].path == tmp_path / "clips" / "3.mp4"
    assert clips["clips/3"].caption == "clip 3, with a comma" and clips["clips/3"].problem == ""
    assert clips["clips/9"].problem == "no file"
    with pytest.raises(UserError, match="the test split of .* is empty"):
        find_listed(root, "test", kind=kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(("file", "caption"), [("path", "text"), ("file_name", "text"), ("video", "caption")])
def test_lists_of_other_makers_are_read(tmp_path: Path, file: str, caption: str) -> None:
    for kind, lines in (
        ("jsonl", [json.dumps({file: f"{name}.mp4", caption: f"clip {name}", "fps": 8}) for name in "abc"]),
        ("csv", [f"{file},fps,{caption}", *(f"{name}.mp4,8,clip {name}" for name in "abc")]),
    ):
        (tmp_path / f"m.{kind}").write_text("\n".join(lines))
        found = [find_listed(tmp_path / f"m.{kind}", split, kind=kind) for split in ("train", "validation")]  # type: ignore[arg-type]
        assert {(clip.path.name, clip.caption) for clips in found for clip in clips} == {
            (f"{name}.mp4", f"clip {name}") for name in "abc"
        }


def test_a_line_may_have_a_template(tmp_path: Path) -> None:
    entry = {"file": "a.mp4", "caption": "holding a cup", "template": "Holding [something]", "placeholders": ["a cup"]}
    lines = [entry, {**entry, "file": "b.mp4", "placeholders": ["a", "b"]}, {"file": "c.mp4"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name in "abc":
        (tmp_path / f"{name}.mp4").write_bytes(b"")
    clips = {
        clip.id: clip
        for split in ("train", "validation")
        for clip in find_listed(tmp_path / "m.jsonl", split, kind="jsonl")
    }  # type: ignore[arg-type]
    assert (clips["a"].template, clips["a"].placeholders) == ("Holding [something]", ("a cup",))
    assert clips["b"].template == "" and clips["c"].problem == "it has no caption"


@pytest.mark.parametrize(
    ("kind", "text", "sentence"),
    [
        ("jsonl", '{"file": "a.mp4"', "line 1 of .* is not valid JSON"),
        ("jsonl", '{"file": "a.mp4", "caption": "x"}\n{"caption": "x"}', "line 2 of .* names no file"),
        ("jsonl", "[1]", "line 1 of .* names no file"),
        ("csv", "file,caption\n,x\n", "line 2 of .* names no file; each line needs file and caption"),
        ("csv", "a.mp4,x\nb.mp4,y\n", "first line of .* names no columns file and caption; begin it: file,caption"),
        ("csv", "", "the train split of .* is empty"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(tmp_path: Path, kind: str, text: str, sentence: str) -> None:
    (tmp_path / f"metadata.{kind}").write_text(text)
    with pytest.raises(UserError, match=sentence):
        find_listed(tmp_path, "train", kind=kind)  # type: ignore[arg-type]


def test_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="data list .*metadata.csv does not exist; set data.root to it, or to the folder"
    ):
        find_listed(tmp_path, "train", kind="csv")
    (tmp_path / "metadata.csv").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot be read .* must be UTF-8 text"):
        find_listed(tmp_path, "train", kind="csv")


def test_a_listed_set_is_trained_on(tmp_path: Path) -> None:
    path = listed(tmp_path, "csv")
    for i in range(10):
        frames = render_clip(i, seed=0, height=16, width=16, num_frames=4, fps=8).frames
        write_video(tmp_path / "clips" / f"{i}.mp4", frames, fps=8)
    config = DataConfig(format="csv", root=str(path), height=16, width=16, min_frames=4, max_frames=4)
    clips = ClipDataset(config, split="train", seed=0, batch_size=2)
    assert len(clips) == 9 and clips[0]["video"].shape == (3, 4, 16, 16)
    assert clips[0]["caption"] == f"clip {clips[0]['id'].removeprefix('clips/')}, with a comma"


def test_lines_end_where_json_and_csv_say(tmp_path: Path) -> None:
    """A caption may hold what other texts break lines at."""
    captions = ["one\u2028line", "one\u0085line", 'said "so",\nthen this']
    entries = [{"file": f"{i}.mp4", "caption": caption} for i, caption in enumerate(captions)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(e, ensure_ascii=False) for e in entries), encoding="utf-8")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file", "caption"])
        writer.writeheader()
        writer.writerows(entries)
    for kind in ("jsonl", "csv"):
        clips = [c for split in ("train", "validation") for c in find_listed(tmp_path / f"a.{kind}", split, kind=kind)]
        assert sorted(clip.caption for clip in clips) == sorted(captions), kind


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "a.csv",
            'file,caption\nc0.mp4,"unterminated\nc1.mp4,good\n',
            "what follows line 1 of .* is not valid CSV: unexpected end",
        ),
        (
            "a.csv",
            f"file,caption\nc0.mp4,{'x' * 200_000}\n",
            "what follows line 1 of .* is not valid CSV: field larger",
        ),
        ("a.jsonl", "[" * 100_000, "line 1 of .* is not valid JSON"),
    ],
)
def test_lines_that_are_none(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        find_listed(tmp_path / name, "train", kind=name[2:])  # type: ignore[arg-type]


def test_names_that_no_file_can_have_cost_their_line_alone(tmp_path: Path) -> None:
    names = ["x" * 300 + ".mp4", "a\ud800.mp4", "null\0.mp4", "b.mp4"]
    lines = [json.dumps({"file": name, "caption": "c"}) for name in names]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.mp4").write_bytes(b"")
    clips = [c for split in ("train", "validation") for c in find_listed(tmp_path / "a.jsonl", split, kind="jsonl")]
    assert {clip.path.name: clip.problem for clip in clips} == {
        name: "" if name == "b.mp4" else "no file" for name in names
    }
