"""benchmarks/data.py measures what it says, and saves it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import data
from vdm.data.transforms import Crop
from vdm.data.video import read_clip, to_video

ROOT = Path(__file__).resolve().parents[2]


def test_every_way_gives_a_clip_of_the_same_shape(tmp_path: Path) -> None:
    data.make_clips(tmp_path, 1)
    for name, read in data.rivals().items():
        clip = read(tmp_path / "0.webm", 0.3)
        assert isinstance(clip, torch.Tensor) and clip.shape == (3, 16, 256, 256), name
        ours = read_clip(tmp_path / "0.webm", fps=8, num_frames=16, start=0.3, crop=Crop(256, 256))
        assert (clip.float() - to_video(ours).float()).abs().mean() < 12, f"{name} reads another part of the clip"


@pytest.mark.slow
def test_the_command_measures(tmp_path: Path) -> None:
    arguments = ["--num_clips", "8", "--rounds", "1", "--json", str(tmp_path / "d.json")]
    done = subprocess.run(
        [sys.executable, "benchmarks/data.py", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "d.json").read_text())
    assert {"raw", "loader", "loader, all augmentation", "loader, tar shard", "cv2 loop"} <= set(record["ways"])
    assert all(way["rate"] > 0 for way in record["ways"].values()) and set(record["workers"]) == {"0", "1", "2"}
