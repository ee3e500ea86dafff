from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdm.data.transforms import Crop, flip, jitter, resize_crop

sides = st.integers(1, 90)
fractions = st.floats(0.0, 1.0)


@given(sides, sides, sides, sides, fractions, fractions)
def test_any_size_becomes_the_size_wanted_and_one_colour_stays_it(old_height, old_width, height, width, x, y):
    frames = np.full((2, old_height, old_width, 3), (10, 130, 250), dtype=np.uint8)
    out = resize_crop(frames, Crop(height=height, width=width, x=x, y=y))
    assert out.shape == (2, height, width, 3) and out.dtype == np.uint8 and out.flags.c_contiguous
    assert (out == (10, 130, 250)).all()


@given(sides, sides, st.integers(0, 20), st.integers(0, 20), fractions, fractions)
def test_without_a_change_of_scale_it_is_a_plain_crop(height, width, more_height, more_width, x, y):
    if more_height and more_width:
        more_width = 0  # both would mean shrinking
    frames = np.random.default_rng(0).integers(0, 256, (2, height + more_height, width + more_width, 3), dtype=np.uint8)
    out = resize_crop(frames, Crop(height=height, width=width, x=x, y=y))
    top, left = (min(2 * round(more * part / 2), more // 2 * 2) for more, part in ((more_height, y), (more_width, x)))
    np.testing.assert_array_equal(out, frames[:, top : top + height, left : left + width])


def ramp(height: int, width: int, *, axis: int) -> np.ndarray:
    """One frame (1,H,W,3) that brightens from 0 to 255 along an axis of the picture."""
    line = np.linspace(0, 255, (height, width)[axis])
    plane = np.broadcast_to(line[:, None] if axis == 0 else line[None], (height, width))
    return np.repeat(plane.round().astype(np.uint8)[None, ..., None], 3, axis=3)


@pytest.mark.parametrize(("fraction", "centre"), [(0.0, 64), (0.5, 128), (1.0, 191)])
def test_the_fractions_place_the_crop(fraction, centre):
    wide = resize_crop(ramp(64, 128, axis=1), Crop(height=32, width=32, x=fraction, y=0.5))
    tall = resize_crop(ramp(128, 64, axis=0), Crop(height=32, width=32, x=0.5, y=fraction))
    assert abs(wide.mean() - centre) < 2
    assert abs(tall.mean() - centre) < 2


def test_the_aspect_ratio_is_kept():
    frames = np.zeros((1, 60, 120, 3), dtype=np.uint8)
    frames[:, 20:40, 50:70] = 255  # a square, in the middle
    white = resize_crop(frames, Crop(height=30, width=40))[0, ..., 0] > 127
    assert white.any(axis=0).sum() == white.any(axis=1).sum() == 10


def test_shrinking_averages_areas():
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    frames = np.repeat(board[None, ..., None], 3, axis=3)
    out = resize_crop(frames, Crop(height=16, width=16)).astype(int)
    assert np.abs(out - 127.5).max() <= 1


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 9))
def test_the_flip_of_a_flip_is_the_clip(length, height, width):
    frames = np.random.default_rng(0).integers(0, 256, (length, height, width, 3), dtype=np.uint8)
    twice = frames.copy()
    flip(twice)
    np.testing.assert_array_equal(twice, frames[:, :, ::-1])
    flip(twice)
    np.testing.assert_array_equal(twice, frames)


@given(st.floats(0.5, 1.5), st.floats(0.5, 1.5), st.floats(0.0, 1.5))
def test_light_is_changed_for_all_frames_alike(brightness, contrast, saturation):
    """Against the same sums in float64, to within a rounding or two of a byte."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
    out = frames.copy()
    jitter(out, brightness=brightness, contrast=contrast, saturation=saturation)
    mean = frames.mean() * brightness
    lit = (frames * brightness - mean) * contrast + mean  # only the end result is held between 0 and 255
    grey = (lit * (0.299, 0.587, 0.114)).sum(-1, keepdims=True)
    expected = np.clip(grey + (lit - grey) * saturation, 0, 255)
    assert np.abs(out.astype(float) - expected).max() <= 2.0
    assert out.dtype == np.uint8 and out.shape == frames.shape


def test_no_change_of_light_is_none():
    frames = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
    out = frames.copy()
    jitter(out, brightness=1.0, contrast=1.0, saturation=1.0)
    np.testing.assert_array_equal(out, frames)
