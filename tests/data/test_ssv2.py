from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdm.data.ssv2 import find_ssv2, validation_ids
from vdm.errors import UserError


def entry(name: str, **changes: object) -> dict[str, object]:
    return {
        "id": name,
        "label": f"holding ball {name}",
        "template": "Holding [something]",
        "placeholders": [f"ball {name}"],
        **changes,
    }


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")


def ids(root: Path, split: str) -> list[str]:
    return [clip.id for clip in find_ssv2(root, split)]


@pytest.mark.parametrize("place", [".", "videos", "20bn-something-something-v2"])
@pytest.mark.parametrize("labels", [".", "labels"])
@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_every_layout_and_both_generations_of_names(tmp_path, place, labels, prefix):
    touch(tmp_path / place, "1.webm", "2.mp4", "3.mkv")
    write(tmp_path / labels / f"{prefix}train.json", [entry("2"), entry("1")])
    write(tmp_path / labels / f"{prefix}validation.json", [entry("3")])
    write(tmp_path / labels / f"{prefix}test.json", [{"id": "3"}])
    write(tmp_path / labels / f"{prefix}labels.json", {"Holding something": "0"})
    train = find_ssv2(tmp_path, "train")
    assert [(clip.id, clip.path.name, clip.caption, clip.problem) for clip in train] == [
        ("2", "2.mp4", "holding ball 2", ""),
        ("1", "1.webm", "holding ball 1", ""),
    ]
    assert ids(tmp_path, "validation") == ["3"]
    assert [(clip.id, clip.caption, clip.problem) for clip in find_ssv2(tmp_path, "test")] == [("3", "", "")]


@pytest.mark.parametrize("labels", [".", "labels"])
@pytest.mark.parametrize("name", ["annotations.json", "train.json", "something-something-v2-train.json"])
def test_without_a_validation_file_a_tenth_is_held_out(tmp_path, labels, name):
    names = [str(number) for number in range(40)]
    touch(tmp_path, *(f"{name}.webm" for name in names))
    write(tmp_path / labels / name, [entry(name) for name in names])
    train, validation = ids(tmp_path, "train"), ids(tmp_path, "validation")
    assert len(validation) == 4 and set(validation) == validation_ids(names)
    assert sorted(train + validation, key=int) == names


def test_clips_of_the_validation_file_are_not_trained_on(tmp_path):
    touch(tmp_path, "1.webm", "2.webm")
    write(tmp_path / "annotations.json", [entry("1"), entry("2")])
    write(tmp_path / "validation.json", [entry("2")])
    assert ids(tmp_path, "train") == ["1"]
    assert ids(tmp_path, "validation") == ["2"]


def test_the_shipped_test_clips_are_found(clips_dir):
    clips = find_ssv2(clips_dir, "train") + find_ssv2(clips_dir, "validation")
    written = {line["id"]: line["label"] for line in json.loads((clips_dir / "annotations.json").read_text())}
    assert {clip.id: clip.caption for clip in clips} == written
    assert all(clip.path.is_file() and not clip.problem for clip in clips)


@given(st.sets(st.text(min_size=1, max_size=4), min_size=1, max_size=60))
def test_the_held_out_tenth_does_not_depend_on_order(names):
    held_out = validation_ids(names)
    assert held_out == validation_ids(sorted(names, reverse=True)) <= names
    assert len(held_out) == max(1, len(names) // 10)


def test_the_held_out_clip_of_a_known_set_stays_the_same():
    # sha256("7") begins with 79, "8" with 2c, "9" with 19, "10" with 4a
    assert validation_ids(["7", "8", "9", "10"]) == {"9"}


def test_a_missing_file_is_a_problem_of_that_clip_alone(tmp_path):
    touch(tmp_path, "1.webm", "3.webm")
    write(tmp_path / "train.json", [entry("3"), entry("2")])
    write(tmp_path / "validation.json", [entry("1")])
    assert [(clip.id, clip.problem) for clip in find_ssv2(tmp_path, "train")] == [("3", ""), ("2", "no file")]


@pytest.mark.parametrize(
    ("changes", "caption", "problem"),
    [
        ({"label": "  a label "}, "a label", ""),
        ({"label": ""}, "holding ball 1", ""),
        ({"label": None}, "holding ball 1", ""),
        ({"label": None, "template": None}, "", "neither a label nor a template"),
        ({"label": None, "placeholders": []}, "", "1 slots but 0 placeholders"),
    ],
)
def test_captions_come_from_the_label_else_from_the_template(tmp_path, changes, caption, problem):
    touch(tmp_path, "1.webm", "2.webm")
    write(tmp_path / "train.json", [entry("1", **changes)])
    write(tmp_path / "validation.json", [entry("2")])
    [clip] = find_ssv2(tmp_path, "train")
    assert clip.caption == caption
    assert problem in clip.problem and bool(problem) == bool(clip.problem)


def test_a_video_goes_before_other_files_of_its_stem_and_hidden_files_do_not_count(tmp_path):
    touch(tmp_path, "1.jpg", "1.webm", "1.json", ".2.webm")
    write(tmp_path / "train.json", [entry("1"), entry(".2")])
    write(tmp_path / "validation.json", [entry("9")])
    assert [(clip.path.name, clip.problem) for clip in find_ssv2(tmp_path, "train")] == [
        ("1.webm", ""),
        (".2", "no file"),
    ]


def test_other_subfolders_are_not_searched(tmp_path):
    touch(tmp_path / "broken", "1.webm")
    write(tmp_path / "train.json", [entry("1")])
    write(tmp_path / "validation.json", [entry("2")])
    with pytest.raises(UserError, match=r"none of the 1 train clips .*train\.json.* \(such as 1\) has a file in"):
        find_ssv2(tmp_path, "train")


def test_numeric_ids_are_read_as_text(tmp_path):
    touch(tmp_path, "1.webm", "2.webm")
    write(tmp_path / "train.json", [{**entry("1"), "id": 1}])
    write(tmp_path / "validation.json", [entry("2")])
    assert ids(tmp_path, "train") == ["1"]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_folder_without_annotations_names_what_was_looked_for(tmp_path, split):
    touch(tmp_path, "1.webm")
    with pytest.raises(UserError, match=rf"has no annotations for the {split} split: looked for .*{split}\.json"):
        find_ssv2(tmp_path, split)


def test_a_folder_that_is_not_there_or_is_a_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; set data\.root"):
        find_ssv2(tmp_path / "nowhere", "train")
    touch(tmp_path, "file")
    with pytest.raises(UserError, match="file is not a folder"):
        find_ssv2(tmp_path / "file", "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", r"train\.json cannot be read"),
        ("\xff", r"train\.json cannot be read"),
        ("{}", r"train\.json holds no JSON list"),
        ('[{"id": "1"}, {"label": "x"}]', r"entry 1 of annotation file .*train\.json has no id"),
        ("[3]", r"entry 0 of annotation file .*train\.json has no id"),
        ("[]", r"the train split of .*train\.json is empty"),
    ],
)
def test_malformed_annotations_are_named(tmp_path, text, message):
    touch(tmp_path, "1.webm")
    (tmp_path / "train.json").write_bytes(text.encode("latin-1"))
    write(tmp_path / "validation.json", [entry("1")])
    with pytest.raises(UserError, match=message):
        find_ssv2(tmp_path, "train")


def test_one_clip_cannot_be_split_in_two(tmp_path):
    touch(tmp_path, "1.webm")
    write(tmp_path / "annotations.json", [entry("1")])
    assert ids(tmp_path, "validation") == ["1"]
    with pytest.raises(UserError, match="train split .* is empty"):
        find_ssv2(tmp_path, "train")
