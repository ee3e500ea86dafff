"""Shapes as the renderer paints them: which, and which way up."""

from __future__ import annotations

import numpy as np
import pytest

from vdm.data.drawing import SHAPE_ART, Canvas
from vdm.data.scenes import PROPORTIONS
from vdm.metrics.silhouettes import resemblance
from vdm.vocabulary import SHAPES, SHAPES_WITH_A_TOP

COLOUR, PAPER = (30.0, 60.0, 220.0), (238.0, 234.0, 220.0)


def painted(shape: str, *, size: int, mirrored: bool = False, degrees: float = 0) -> tuple[np.ndarray, ...]:
    """mask, saturation and value of a shape upon grey, `size` pixels large."""
    pixels, labels = np.full((64, 64, 3), 140, np.uint8), np.zeros((64, 64), np.uint8)
    width, height = PROPORTIONS[shape]
    at, extent = np.array([32.0, 32.0]), np.array([-width if mirrored else width, height]) * size
    Canvas(pixels, labels).paint(SHAPE_ART[shape], at=at, size=extent, degrees=degrees, paints=(COLOUR, PAPER), label=1)
    value = pixels.max(axis=-1)
    saturation = (255.0 * (value - pixels.min(axis=-1)) / value).astype(np.uint8)
    return labels == 1, saturation, value


def likeness(shape: str, **how: float) -> np.ndarray:
    mask, saturation, value = painted(shape, **how)  # type: ignore[arg-type]
    return resemblance(mask, saturation=saturation, value=value, hidden=np.zeros_like(mask))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [12, 16, 40])
@pytest.mark.parametrize("mirrored", [False, True])
def test_each_is_most_like_itself(shape: str, size: int, mirrored: bool) -> None:
    upright = likeness(shape, size=size, mirrored=mirrored)[:, 0]
    assert SHAPES[int(upright.argmax())] == shape


@pytest.mark.parametrize("shape", SHAPES_WITH_A_TOP)
@pytest.mark.parametrize("size", [12, 40])
def test_which_way_up(shape: str, size: int) -> None:
    row = SHAPES.index(shape)
    for degrees, side in ((0, 1), (180, -1)):
        upright, upside_down = likeness(shape, size=size, degrees=degrees)[row]
        assert side * (upright - upside_down) > 0.05


def test_what_a_hand_hides_does_not_count() -> None:
    mask, saturation, value = painted("bottle", size=30)
    hidden = np.zeros_like(mask)
    hidden[38:44] = True
    seen = resemblance(mask & ~hidden, saturation=saturation, value=value, hidden=hidden)
    assert SHAPES[int(seen[:, 0].argmax())] == "bottle"
    row = SHAPES.index("bottle")
    blind = resemblance(mask & ~hidden, saturation=saturation, value=value, hidden=np.zeros_like(hidden))
    assert seen[row, 0] > blind[row, 0]
