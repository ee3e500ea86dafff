"""Labels of pixels against the vocabulary, and against the renderer's own masks."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from vdm.data.dataset import VALIDATION_OFFSET
from vdm.data.mini_something import render_clip
from vdm.metrics.segmentation import HAND, LARGEST, NAMES, WHITE, segment
from vdm.vocabulary import BACKGROUND_MAX_SATURATION, COLOURS, HAND_HUES


def flat(hue: float, saturation: float, value: float) -> np.ndarray:
    """Two frames of one colour of OpenCV's HSV."""
    pixels = np.full((16, 16, 3), (hue, saturation, value), np.uint8)
    return np.stack([cv2.cvtColor(pixels, cv2.COLOR_HSV2RGB)] * 2)


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("saturation", [150, 235])
@pytest.mark.parametrize("value", [70, 250])
def test_the_whole_range_of_a_colour(name: str, saturation: int, value: int) -> None:
    for hue in (hue for low, high in COLOURS[name].hues for hue in (low, (low + high) // 2, high)):
        assert (segment(flat(hue, saturation, value)).labels == 1 + NAMES.index(name)).all(), hue


def test_hands_backgrounds_and_cloth() -> None:
    for hue in (HAND_HUES[0] + 1, 13, HAND_HUES[1] - 1):
        assert (segment(flat(hue, 70, 130)).labels == HAND).all()
        assert (segment(flat(hue, 118, 245)).labels == HAND).all()
    for hue in range(0, 180, 15):
        assert (segment(flat(hue, BACKGROUND_MAX_SATURATION - 6, 150)).labels == 0).all(), hue
    assert (segment(flat(0, 10, 235)).labels == WHITE).all()


def test_against_the_renderers_masks() -> None:
    overlaps = []
    for index in range(VALIDATION_OFFSET, VALIDATION_OFFSET + 12):
        clip = render_clip(index, seed=0, height=64, width=64, num_frames=8, fps=4.0, masks=True)
        mine = segment(clip.frames).labels == 1 + NAMES.index(clip.colours[0])
        theirs = clip.truth.masks["object"] > 127
        overlaps.append((mine & theirs).sum() / (mine | theirs).sum())
    assert min(overlaps) > 0.6
    assert np.mean(overlaps) > 0.8


def test_large_clips_are_shrunk() -> None:
    assert segment(np.zeros((2, 256, 384, 3), np.uint8)).labels.shape == (2, LARGEST, LARGEST * 3 // 2)
    assert segment(np.zeros((2, 100, 384, 3), np.uint8)).value.shape == (2, 100, 384)
