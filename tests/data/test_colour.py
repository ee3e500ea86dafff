"""Colours of decoded frames against libav's own careful conversion."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from hypothesis import given
from hypothesis import strategies as st

from vdm.data.colour import ACCURATE, LIGHT, to_rgb, to_yuv
from vdm.data.transforms import Crop, resize_crop

PLAIN = ("166766.webm", "pancake_flip.mkv", "arm_wrestling.mp4", "eye_makeup.avi", "pouring_coffee.mp4")


def careful(frame: VideoFrame) -> np.ndarray:
    return np.asarray(frame.to_ndarray(format="rgb24", interpolation=ACCURATE))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("crop", [Crop(256, 256), Crop(64, 64, 0.0, 1.0), Crop(200, 300, 0.7, 0.2)])
def test_cropping_the_planes_is_converting_the_picture_and_cropping_that(
    clips_dir: Path, name: str, crop: Crop
) -> None:
    """To within rounding, but for single samples where colours meet sharply, which the other way blurs twice."""
    with av.open(str(clips_dir / name)) as container:
        frame = next(container.decode(video=0))
        ours = to_rgb(frame, crop, size=(frame.width, frame.height))
        theirs = resize_crop(careful(frame)[None], crop)[0]
    error = np.abs(ours.astype(float) - theirs)
    assert ours.shape == (crop.height, crop.width, 3)
    assert error.mean() < 1.0 and np.percentile(error, 99) <= 10, (error.mean(), np.percentile(error, 99), error.max())
    shifted = np.abs(np.roll(ours, 1, axis=1).astype(float) - theirs)
    assert shifted.mean() > 1.5 * error.mean(), "it would be seen if it were a pixel off"


@given(st.sampled_from(sorted(LIGHT)), st.booleans(), st.integers(2, 33), st.integers(2, 33), st.integers(0, 2**24 - 1))
def test_one_colour_is_that_colour_in_every_space_and_range(
    space: int, full: bool, width: int, height: int, colour: int
) -> None:
    """Odd sizes too. Against the same sums in float64, whose results may lie half a step off."""
    samples = colour >> 16, colour >> 8 & 255, colour & 255
    frame = VideoFrame(width, height, "yuvj420p" if full else "yuv420p")
    frame.colorspace = space
    for plane, value in zip(frame.planes, samples, strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    rgb = to_rgb(frame, Crop(8, 8), size=(width, height))
    red, blue = LIGHT[space]
    y, cb, cr = (float(value) - zero for value, zero in zip(samples, (0 if full else 16, 128, 128), strict=True))
    if not full:
        y, cb, cr = y / 219 * 255, cb / 224 * 255, cr / 224 * 255
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    g = (y - red * r - blue * b) / (1 - red - blue)
    assert np.abs(rgb - np.clip([r, g, b], 0, 255)).max() <= 1.0


@pytest.mark.parametrize("space", [Colorspace.ITU601, Colorspace.ITU709])
def test_it_is_what_libav_makes_of_it(space: Colorspace) -> None:
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(40, 216, (6, 6, 3), dtype=np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC)
    frame = VideoFrame.from_ndarray(smooth, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=space, dst_color_range=ColorRange.MPEG, interpolation=ACCURATE
    )
    ours = to_rgb(frame, Crop(48, 64), size=(64, 48)).astype(float)
    assert np.abs(ours - careful(frame)).mean() < 1.0 and np.abs(ours - smooth).mean() < 2.0


def test_other_formats_go_through_libav() -> None:
    picture = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8), (64, 48))
    for kind in ("yuv444p", "yuv420p10le", "rgb24", "gray"):
        frame = VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=kind)
        want = resize_crop(careful(frame)[None], Crop(24, 24))[0]
        assert np.abs(to_rgb(frame, Crop(24, 24), size=(64, 48)).astype(float) - want).max() <= 10


@pytest.mark.parametrize("tag", [0, 3])
def test_tags_without_a_meaning_do_not_matter(tag: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    plain, odd = to_yuv(pixels), to_yuv(pixels)
    odd.color_primaries = odd.color_trc = tag
    ours, theirs = (to_rgb(frame, None, size=(8, 8)) for frame in (odd, plain))
    assert np.array_equal(ours, theirs)
