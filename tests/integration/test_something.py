"""Something-Something V2 in small: 2,000 clips as VP9 in webm, both generations of names, through every command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.data import write_vp9
from vdm.data.mini_something import render_clip

Command = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "fixtures" / "tiny.yaml"
NUM_CLIPS, NUM_VALIDATION = 2000, 200
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same clips and annotations under the old names and the new ones."""
    old, new = (tmp_path_factory.mktemp("something") / name for name in ("old", "new"))
    videos = old / "20bn-something-something-v2"
    videos.mkdir(parents=True)
    entries = []
    for number in range(NUM_CLIPS):
        clip = render_clip(number, seed=0, height=64, width=96, num_frames=20 + number % 30, fps=12)
        write_vp9(videos / f"{number}.webm", clip.frames, fps=12)
        about = {"label": clip.label, "template": clip.template, "placeholders": list(clip.placeholders)}
        entries.append({"id": str(number), **about})
    (new / "labels").mkdir(parents=True)
    (new / "videos").symlink_to(videos)
    labels = sorted({entry["template"].replace("[", "").replace("]", "") for entry in entries})
    for name, content in (
        ("train", entries[NUM_VALIDATION:]),
        ("validation", entries[:NUM_VALIDATION]),
        ("labels", {label: str(number) for number, label in enumerate(labels)}),
    ):
        (old / f"something-something-v2-{name}.json").write_text(json.dumps(content))
        (new / "labels" / f"{name}.json").write_text(json.dumps(content))
    return {"old": old, "new": new}


@pytest.mark.parametrize("names", ["old", "new"])
def test_check_and_view(roots: dict[str, Path], names: str, command: Command, tmp_path: Path) -> None:
    report, page = tmp_path / "report.json", tmp_path / "view.html"
    done = command("vdm", "data", "check", roots[names], "--json", report)
    assert done.code == 0, done
    assert f"{NUM_CLIPS} clips: " in done.out and ", 0 bad" in done.out
    records = json.loads(report.read_text())
    assert len(records) == NUM_CLIPS
    assert all((one["frames"], one["width"], one["height"]) == (20 + int(one["id"]) % 30, 96, 64) for one in records)
    assert {one["fps"] for one in records} <= {12.0} | {
        round(one["fps"], 3) for one in records if 11.9 < one["fps"] < 12.1
    }
    done = command(
        "vdm", "data", "view", roots[names], "--output", page, "--num_clips", 6, "data.height=64", "data.width=64"
    )
    assert done.code == 0 and page.read_text().count("<video") == 6


def test_cache_and_train_from_files_and_from_cache(roots: dict[str, Path], command: Command, tmp_path: Path) -> None:
    """The cache is made under the new names, and the losses from it are those from the files.

    The VAE adds up the two clips of a batch in another order than one alone; what that makes grows with every step.
    """
    common = [
        TINY, "data.format=ssv2", f"data.root={roots['new']}", "data.num_clips=null", "data.min_frames=2",
        "data.max_frames=6", "data.crop=centre", "data.validation_clips=20", "text.text_trainable=false",
        "data.dataloader_num_workers=2", "training.validation_steps=10",
    ]  # fmt: skip
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    done = command("vdm", "data", "cache", *common, cache, "--dtype", "fp32")
    assert done.code == 0 and f"{NUM_CLIPS - NUM_VALIDATION} clips in up to 1 looks" in done.out, done
    logs = {}
    for name, more in (("files", ()), ("cached", (cache,))):
        done = command("train.py", *common, *more, f"run_dir={tmp_path / name}")
        assert done.code == 0, done
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logs[name] = [json.loads(line) for line in lines]
    assert len(logs["files"]) == 20
    for key in ("loss", "val_loss"):
        ours, theirs = ([line[key] for line in logs[name] if key in line] for name in ("cached", "files"))
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert logs["cached"][0]["loss"] == pytest.approx(logs["files"][0]["loss"], rel=1e-6)
