"""`vdm data check`: every clip in full, and what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vdm.data import check as checking
from vdm.data.check import Checked, check, check_clip, find_all, table
from vdm.data.mini_something import render_clip, write_ssv2
from vdm.data.ssv2 import ClipFile
from vdm.data.video import write_video

Command = Callable[..., Any]
# id -> frames that decode, size after rotation, average rate; from a full sequential decode, and the README beside them
REAL = {
    "166766": (49, (427, 240), 12.0), "gulpio_test": (140, (256, 144), 30.0), "pancake_flip": (310, (426, 240), 30.0),
    "arm_wrestling": (280, (340, 256), 28.0), "eye_makeup": (164, (320, 240), 25.0),
    "pouring_coffee": (287, (1280, 720), 29.97), "cup_shuffle": (300, (1280, 720), 29.97),
    "bottles_long": (1189, (640, 360), 29.83), "street_walk_5frames": (5, (960, 540), 5.0),
    "dog_snow_5fps": (40, (640, 480), 5.0), "nasa_rot270": (17, (270, 480), 29.97),
    "camera_left_rot180_vfr": (25, (1280, 720), 10.5),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six good clips in SSv2 layout; not to be changed."""
    root = tmp_path_factory.mktemp("good") / "set"
    write_ssv2(root, num_clips=6, size=32, num_frames=20, fps=8, seed=1)
    return root


def test_real_clips_are_what_they_are(clips_dir: Path) -> None:
    found = {one.id: one for one in check(clips_dir)}
    assert found.keys() == REAL.keys()
    for name, (frames, size, fps) in REAL.items():
        one = found[name]
        assert (one.frames, (one.width, one.height)) == (frames, size), name
        assert one.fps == pytest.approx(fps, rel=0.02), name
        assert one.duration == pytest.approx(frames / fps, rel=0.05), name
    assert {name: one.rotation for name, one in found.items() if one.rotation}.keys() == {
        "nasa_rot270", "camera_left_rot180_vfr",
    }  # fmt: skip
    problems = {name: one.problem for name, one in found.items() if one.problem}
    assert problems == {"nasa_rot270": "short: 0.57 seconds", "street_walk_5frames": "short: 1.00 seconds"}
    assert not any(one.bad for one in found.values())


def test_real_damage_is_found(clips_dir: Path) -> None:
    found = {one.id: one for one in check(clips_dir / "broken")}
    assert found["corrupted_tail"].problem is not None
    assert found["corrupted_tail"].problem.startswith("truncated: 28 of 50 frames decode")
    assert (found["av1_undecodable"].frames, found["av1_undecodable"].problem) == (125, None), "PyAV decodes it"


def test_all_kinds_of_trouble(command: Command, good: Path, tmp_path: Path) -> None:
    root = shutil.copytree(good, tmp_path / "set")
    ids = [clip.id for clip in find_all(root)]
    assert len(ids) == 6
    files = {name: next(root.glob(f"*/{name}.mp4")) for name in ids}
    files[ids[0]].write_bytes(b"not a video")
    files[ids[1]].unlink()
    files[ids[2]].write_bytes(files[ids[2]].read_bytes()[:-2500])
    still = render_clip(0, seed=0, height=32, width=32, num_frames=1, fps=8).frames
    write_video(files[ids[3]], np.repeat(still, 24, axis=0), fps=8)
    write_video(files[ids[4]], render_clip(0, seed=0, height=32, width=32, num_frames=5, fps=8).frames, fps=8)
    result = command("vdm", "data", "check", root, "--json", tmp_path / "report.json", "--num-workers", 2)
    assert result.code == 3 and "Traceback" not in result.err
    records = {record["id"]: record for record in json.loads((tmp_path / "report.json").read_text())}
    assert list(records) == ids
    assert set(records[ids[5]]) == {
        "id", "file", "frames", "width", "height", "fps", "duration", "rotation", "problem",
    }  # fmt: skip
    problems = [records[name]["problem"] for name in ids]
    assert problems[1] == "no file" and problems[5] is None
    assert problems[3].startswith("frozen: ") and "of 24 frames" in problems[3]
    assert problems[4] == "short: 0.62 seconds"
    assert problems[2].startswith("truncated: ") or "no frame" in problems[2] or "invalid" in problems[2]
    assert "6 clips: 1 good, 1 short, 4 bad" in result.out
    for name in ids[:5]:
        assert f"  {name}: " in result.out
    good_record = records[ids[5]]
    assert (good_record["frames"], good_record["width"], good_record["fps"]) == (20, 32, 8.0)


def test_a_label_that_is_not_its_template_is_named(good: Path, tmp_path: Path) -> None:
    root = shutil.copytree(good, tmp_path / "set")
    [file] = [path for path in root.rglob("*train.json")]
    entries = json.loads(file.read_text())
    entries[0]["label"] = "something else altogether"
    file.write_text(json.dumps(entries))
    bad = [one for one in check(root, num_workers=1) if one.bad]
    assert [one.id for one in bad] == [entries[0]["id"]]
    assert "'something else altogether' is not its template" in str(bad[0].problem)


def test_good_and_short_sets_pass(command: Command, good: Path, tmp_path: Path) -> None:
    assert command("vdm", "data", "check", good).code == 0
    for i in range(3):
        clip = render_clip(i, seed=0, height=16, width=16, num_frames=4, fps=8).frames
        write_video(tmp_path / f"{i}.mp4", clip, fps=8)
        (tmp_path / f"{i}.txt").write_text("a clip")
    result = command("vdm", "data", "check", tmp_path)
    assert result.code == 0 and "3 clips: 0 good, 3 short, 0 bad" in result.out
    (tmp_path / "1.txt").unlink()
    assert command("vdm", "data", "check", tmp_path).code == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("PLACE/nowhere", "data folder .*nowhere does not exist"),
        ("PLACE/empty", "holds no video"),
        ("PLACE/empty --num_workers 0", "--num_workers must be at least 1"),
        ("PLACE/empty --time_limit 0", "--time_limit must be above 0"),
        ("GOOD --json PLACE/file/x.json", "cannot write .*; choose another --"),
        ("", "arguments are required: DIR"),
    ],
)
def test_bad_input_is_one_sentence(command: Command, good: Path, tmp_path: Path, arguments: str, sentence: str) -> None:
    import re

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    words = arguments.replace("PLACE", str(tmp_path)).replace("GOOD", str(good)).split()
    error = command("vdm", "data", "check", *words).error
    assert re.search(sentence, error), error


def test_a_file_of_sound_alone_has_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    assert check_clip(ClipFile("sound", tmp_path / "sound.mp4", "x")).problem == "it has no video stream"


def test_a_decoder_that_dies_costs_one_clip(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = find_all(good)
    real = checking.check_clip

    monkeypatch.setattr(checking, "check_clip", _Fatal(real, clips[2].id))
    found = check(good, num_workers=2)
    assert [one.id for one in found] == [clip.id for clip in clips]
    assert [one.id for one in found if one.bad] == [clips[2].id]
    assert "its decoder died" in str(found[2].problem)


class _Fatal:
    """Dies on one clip, as a fault in a codec would."""

    def __init__(self, real: Callable[[ClipFile], Checked], name: str):
        self.real, self.name = real, name

    def __call__(self, clip: ClipFile) -> Checked:
        import os

        if clip.id == self.name:
            os._exit(139)
        return self.real(clip)


def test_the_table_of_nothing_decodable() -> None:
    lines = table([Checked("1", "1.mp4", problem="no file")]).splitlines()
    assert lines == ["1 clips: 0 good, 0 short, 1 bad", "  1: no file (1.mp4)"]


def test_a_damaged_list_of_a_split_is_not_passed_over(good: Path, tmp_path: Path, command: Command) -> None:
    root = tmp_path / "set"
    shutil.copytree(good, root)
    entries = json.loads(next(root.rglob("*train.json")).read_text()) if list(root.rglob("*train.json")) else None
    whole = next(path for path in root.rglob("*.json") if path.stem in ("annotations", "train"))
    (whole.parent / "validation.json").write_text(json.dumps((entries or json.loads(whole.read_text()))[:1]))
    whole.write_text(whole.read_text()[:100])
    assert "cannot be read" in command("vdm", "data", "check", root).error


def test_a_clip_that_changes_its_size_is_checked(tmp_path: Path) -> None:
    for name, size in (("a", 48), ("b", 64)):
        write_ts(tmp_path / f"{name}.ts", size)
    both = (tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes()
    (tmp_path / "c.ts").write_bytes(both)
    found = check_clip(ClipFile("c", tmp_path / "c.ts", "x"))
    assert found.frames >= 15, "the last of one half may be lost in the seam"
    assert not (found.problem or "").startswith("it cannot be checked")


def write_ts(path: Path, size: int) -> None:
    clip = render_clip(0, seed=0, height=size, width=size, num_frames=8, fps=8)
    with av.open(str(path), "w", format="mpegts") as file:
        stream = file.add_stream("mpeg2video", rate=25)
        stream.height, stream.width, stream.pix_fmt = size, size, "yuv420p"
        for pixels in clip.frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))


def test_whatever_one_clip_does_the_others_are_checked(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = checking.scan

    def fail_once(path: Any) -> Any:
        if path.stem == "3":
            raise RuntimeError("out of ideas")
        return scan(path)

    monkeypatch.setattr(checking, "scan", fail_once)
    found = {one.id: one.problem for one in check(good, num_workers=2)}
    assert len(found) == 6 and found["3"] == "it cannot be checked: RuntimeError: out of ideas"


def test_what_is_no_plain_file_is_named(good: Path, tmp_path: Path) -> None:
    """A pipe in place of a clip or caption would be waited for in vain."""
    for name in ("a", "b", "c"):
        shutil.copy(next(good.glob("*/1.mp4")), tmp_path / f"{name}.mp4")
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "b.txt")
    os.mkfifo(tmp_path / "d.mp4")
    (tmp_path / "d.txt").write_text("d")
    odd = os.fsdecode(b"e\xff.mp4")
    shutil.copy(tmp_path / "a.mp4", tmp_path / odd)
    problems = {one.id: one.problem for one in check(tmp_path, time_limit=10)}
    assert problems["b"] == "its caption file b.txt is no plain file"
    assert problems["d"] == "it is no plain file, or nobody may read it"
    assert problems["a"] is None and len(problems) == 5
    table(check(tmp_path, time_limit=10))


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    good: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "check", lambda *_, **__: pytest.fail("it has begun"))
    assert "cannot write" in command("vdm", "data", "check", good, "--json", tmp_path).error
    assert "at most 1e6 seconds" in command("vdm", "data", "check", good, "--time_limit", "inf").error


def test_a_report_that_is_there_stays_where_nothing_can_be_checked(
    good: Path, tmp_path: Path, command: Command
) -> None:
    report = tmp_path / "report.json"
    assert command("vdm", "data", "check", good, "--json", report).code == 0
    before = report.read_bytes()
    assert command("vdm", "data", "check", tmp_path / "mistyped", "--json", report).code == 2
    assert report.read_bytes() == before and len(json.loads(before)) == 6
