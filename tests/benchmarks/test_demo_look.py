"""The look at the demo model: the nearest clip is found, and the command writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import demo_look
from vdm.data.mini_something import render_clip
from vdm.errors import UserError


@given(st.integers(0, 2**32 - 1))
def test_the_nearest_is_the_nearest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clips, others = rng.random((3, 12), dtype=np.float32), rng.random((5, 12), dtype=np.float32)
    distances = np.sqrt(((clips[:, None] - others) ** 2).mean(2))
    found, numbers = demo_look.nearest(clips, others)
    assert np.allclose(found, distances.min(1), atol=1e-6)
    assert np.allclose(distances[range(3), numbers], distances.min(1), atol=1e-3)


def test_a_training_clip_is_found_again() -> None:
    sizes = {"height": 64, "width": 64, "num_frames": 8, "fps": 4.0}
    seen, names = demo_look.trained_on([(0, 6), (1, 4)], **sizes)
    again = demo_look.small(render_clip(3, seed=1, **sizes).frames)  # type: ignore[arg-type]
    distances, found = demo_look.nearest(again[None], seen)
    assert names[found[0]] == (1, 3) and distances[0] == 0
    assert demo_look.nearest(demo_look.held_out(4, seed=0, **sizes), seen)[0].min() > 0.01


@pytest.mark.parametrize("trained", ["40000", "0:many", "0:0"])
def test_what_was_trained_on_is_said_in_full(trained: str) -> None:
    with pytest.raises(UserError, match="--trained"):
        demo_look.command(["--trained", trained])


@pytest.mark.slow
def test_the_command_writes_a_picture_and_distances(tmp_path: Path) -> None:
    sheet, file = tmp_path / "sheet.png", tmp_path / "look.json"
    options = ["--clips_per_action", "1", "--trained", "0:20", "--sheet", str(sheet), "--json", str(file)]
    demo_look.command(options)
    record = json.loads(file.read_text())
    assert len(record["rows"]) == 16 and record["held out"]["clips"] == 64
    assert cv2.imread(str(sheet)).shape[1] == 4 * 4 * 64
