"""SSIM and PSNR: known values, scikit-image as oracle, and what must not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdm.errors import UserError
from vdm.metrics.similarity import frame_ssim, psnr, ssim


def image(rows: np.ndarray) -> Tensor:
    """(H,W) -> (H,W,1)."""
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float64))[..., None]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


RAMP = np.tile(np.arange(32) / 31, (32, 1))
CHECKS = np.indices((32, 32)).sum(0) % 2
SQUARE = np.zeros((32, 32))
SQUARE[8:24, 8:24] = 1


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (np.zeros((32, 32)), np.ones((32, 32)), 1e-4 / (1 + 1e-4)),
        (np.full((32, 32), 0.5), np.full((32, 32), 0.25), 0.8000639795),
        (RAMP, 1 - RAMP, -0.5006225772),
        (RAMP, np.roll(RAMP, 1, axis=1), 0.9876396889),
        (RAMP, RAMP.T, 0.1364484145),
        (CHECKS, 1 - CHECKS, -0.9964064684),
        (SQUARE, np.roll(SQUARE, 1, axis=1), 0.6636218285),
        (SQUARE, np.roll(SQUARE, 2, axis=1), 0.4965416522),
        (SQUARE, np.roll(SQUARE, 4, axis=1), 0.3595096252),
    ],
)
def test_ssim_by_known_values(a: np.ndarray, b: np.ndarray, expected: float) -> None:
    assert ssim(image(a), image(b), data_range=1.0).item() == pytest.approx(expected, abs=5e-11)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["noise", "smooth", "float"])
@pytest.mark.parametrize("size", [(11, 11), (11, 40), (33, 21)])
def test_ssim_and_psnr_are_those_of_scikit_image(kind: str, size: tuple[int, int]) -> None:
    oracle = pytest.importorskip("skimage.metrics")
    rng, scale = np.random.default_rng(sum(size)), 255.0
    a = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    b = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    if kind == "smooth":
        b = np.clip(a.astype(int) + rng.integers(-9, 10, a.shape), 0, 255).astype(np.uint8)
    if kind == "float":
        a, b, scale = a / 127.5 - 1.0, b / 127.5 - 1.0, 2.0
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    theirs = oracle.structural_similarity(a, b, data_range=scale, channel_axis=2, **gaussian)
    assert ssim(torch.from_numpy(a), torch.from_numpy(b), data_range=scale).item() == pytest.approx(theirs, abs=1e-12)
    theirs = oracle.peak_signal_noise_ratio(a, b, data_range=scale)
    assert psnr(torch.from_numpy(a), torch.from_numpy(b), data_range=scale).item() == pytest.approx(theirs, abs=1e-12)


def test_ssim_does_not_care_for_the_scale_of_pixels() -> None:
    a, b = noise(0, 2, 20, 24, 3), noise(1, 2, 20, 24, 3)
    bytes_ = ssim(a, b, data_range=255.0)
    torch.testing.assert_close(ssim(a / 255.0, b / 255.0, data_range=1.0), bytes_, rtol=0, atol=1e-6)
    torch.testing.assert_close(ssim(a.double() / 255, b.double() / 255, data_range=1.0), bytes_, rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(11, 19), st.integers(11, 19), st.integers(1, 5))
def test_properties_of_ssim(seed: int, height: int, width: int, channels: int) -> None:
    a, b = noise(seed, 2, height, width, channels), noise(seed + 1, 2, height, width, channels)
    value = ssim(a, b, data_range=255.0)
    assert torch.equal(ssim(a, a, data_range=255.0), torch.ones(2, dtype=torch.float64))
    assert torch.equal(ssim(b, a, data_range=255.0), value)
    assert bool((value.abs() < 1).all())
    for dim in (1, 2):
        torch.testing.assert_close(ssim(a.flip(dim), b.flip(dim), data_range=255.0), value, rtol=0, atol=1e-12)
    torch.testing.assert_close(psnr(a, b, data_range=255.0), psnr(b.flip(1), a.flip(1), data_range=255.0))


def test_psnr_by_hand() -> None:
    a = torch.zeros(3, 2, 2, 1)
    b = torch.stack([torch.full((2, 2, 1), 0.1), torch.zeros(2, 2, 1), torch.ones(2, 2, 1)])
    assert psnr(a, b, data_range=1.0).tolist() == pytest.approx([20.0, math.inf, 0.0], abs=1e-6)
    assert psnr(a, b, data_range=2.0)[2].item() == pytest.approx(10 * math.log10(4))
    assert psnr(noise(0, 7, 5, 3), noise(0, 7, 5, 3), data_range=255.0).shape == ()


def test_frame_ssim_is_the_mean_over_neighbours() -> None:
    clip = noise(2, 1, 4, 16, 12, 3)
    pairs = [ssim(clip[0, t], clip[0, t + 1], data_range=255.0).item() for t in range(3)]
    assert frame_ssim(clip).item() == pytest.approx(sum(pairs) / 3, abs=1e-15)
    assert frame_ssim(clip[:, :1].expand(-1, 5, -1, -1, -1)).item() == 1.0
    assert frame_ssim(clip.flip(1)).item() == pytest.approx(frame_ssim(clip).item(), abs=1e-15)


def test_neither_batch_nor_memory_changes_a_bit() -> None:
    clips = noise(3, 7, 3, 17, 13, 3)
    before = clips.clone()
    together = frame_ssim(clips)
    assert torch.equal(together, torch.cat([frame_ssim(clip[None]) for clip in clips]))
    assert torch.equal(together, frame_ssim(clips))
    channels_first = clips.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    assert torch.equal(together, frame_ssim(channels_first))
    assert torch.equal(clips, before)


def test_what_cannot_be_compared_is_said() -> None:
    small = torch.zeros(1, 2, 10, 64, 3, dtype=torch.uint8)
    with pytest.raises(UserError, match="11 pixels a side or more, not 64x10"):
        frame_ssim(small)
    with pytest.raises(UserError, match="2 frames or more, not 1"):
        frame_ssim(noise(0, 1, 1, 16, 16, 3))
    with pytest.raises(ValueError, match="uint8"):
        frame_ssim(torch.zeros(1, 2, 16, 16, 3))
    frame = noise(0, 16, 16, 3)
    with pytest.raises(ValueError, match="one dtype and shape"):
        ssim(frame, frame.float(), data_range=255.0)
    with pytest.raises(ValueError, match="one dtype and shape"):
        psnr(frame, frame[1:], data_range=255.0)
    with pytest.raises(ValueError, match="one dtype and shape"):
        ssim(frame[:0], frame[:0], data_range=255.0)


@pytest.mark.parametrize("compare", [ssim, psnr])
def test_pixels_that_the_range_does_not_hold_are_refused(compare: object) -> None:
    assert callable(compare)
    plus_minus = torch.linspace(-1, 1, 300).reshape(10, 10, 3).repeat(2, 2, 1)
    with pytest.raises(ValueError, match="from -1 to 1, which data_range 1 does not hold"):
        compare(plus_minus, plus_minus, data_range=1.0)
    with pytest.raises(ValueError, match="data_range 1 "):
        compare(noise(0, 16, 16, 3), noise(1, 16, 16, 3), data_range=1.0)
    plus_minus[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="nan"):
        compare(plus_minus, plus_minus, data_range=2.0)
