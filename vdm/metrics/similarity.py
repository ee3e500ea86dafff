"""How alike two images are, and the consecutive frames of a clip: SSIM and PSNR, in float64, at any scale of pixels."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from vdm.errors import UserError

WINDOW, SIGMA = 11, 1.5  # the Gaussian window of the paper, in pixels
K1, K2 = 0.01, 0.03


def ssim(a: Tensor, b: Tensor, *, data_range: float) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13) of images (..., H, W, C) -> float64 (...), 1 where equal.

    Means and (population) variances under a Gaussian window, only where it lies within the image; each channel alone,
    then the mean over places and channels. `data_range` is that of the pixels: 255 for uint8, 1 for [0, 1], 2 for
    [-1, 1]. Raises UserError for images under 11 pixels a side; ValueError where shapes or dtypes differ, a number is
    NaN, or the pixels span more than `data_range`.
    """
    _check_pair(a, b, data_range)
    H, W = a.shape[-3:-1]
    if min(H, W) < WINDOW:
        raise UserError(f"SSIM needs frames of {WINDOW} pixels a side or more, not {W}x{H}; compare larger ones")
    pairs = zip(_images(a), _images(b), strict=True)
    values = [_ssim_of_one(x, y, data_range) for x, y in pairs]
    return torch.tensor(values, dtype=torch.float64).reshape(a.shape[:-3])


def psnr(a: Tensor, b: Tensor, *, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio of images (..., H, W, C) in decibels -> float64 (...); infinite where they are equal.

    10 log10(data_range^2 / mean squared error), the mean over the whole image. Raises ValueError as `ssim` does.
    """
    _check_pair(a, b, data_range)
    pairs = zip(_images(a), _images(b), strict=True)
    errors = torch.tensor([float(np.mean(np.square(x - y))) for x, y in pairs], dtype=torch.float64)
    return (10.0 * torch.log10(data_range**2 / errors)).reshape(a.shape[:-3])


def frame_ssim(clips: Tensor) -> Tensor:
    """Mean SSIM of consecutive frames, uint8 (B,T,H,W,3) -> float64 (B,): how much stays the same.

    It describes and does not judge: a still has 1. Raises UserError for clips of one frame or under 11 pixels a side,
    ValueError for other shapes and dtypes.
    """
    require_clips(clips, least=2, asked_by="frame SSIM")
    return ssim(clips[:, :-1], clips[:, 1:], data_range=255.0).mean(1)


def require_clips(clips: Tensor, *, least: int, asked_by: str) -> None:
    """ValueError unless `clips` are uint8 (B,T,H,W,3); UserError where they have fewer than `least` frames."""
    if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[-1] != 3:
        raise ValueError(f"clips must be uint8 (B,T,H,W,3), not {clips.dtype} {tuple(clips.shape)}")
    if clips.shape[1] < least:
        raise UserError(f"{asked_by} needs clips of {least} frames or more, not {clips.shape[1]}; give longer ones")


def _check_pair(a: Tensor, b: Tensor, data_range: float) -> None:
    if a.shape != b.shape or a.dtype != b.dtype or a.ndim < 3 or a[..., :1, :1, :1].numel() == 0:
        kinds = f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        raise ValueError(f"images must be two of one dtype and shape (..., H, W, C), not {kinds}")
    low, high = (float(extreme) for extreme in torch.stack([*a.aminmax(), *b.aminmax()]).double().aminmax())
    if not high - low <= data_range:  # so that NaN is refused too
        raise ValueError(f"pixels go from {low:g} to {high:g}, which data_range {data_range:g} does not hold")


def _images(x: Tensor) -> np.ndarray:
    """(..., H, W, C) -> float64 (N,H,W,C)."""
    return x.detach().cpu().double().contiguous().reshape(-1, *x.shape[-3:]).numpy()


def _ssim_of_one(x: np.ndarray, y: np.ndarray, data_range: float) -> float:
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x = _windowed(x * x) - mean_x * mean_x
    var_y = _windowed(y * y) - mean_y * mean_y
    covariance = _windowed(x * y) - mean_x * mean_y
    light = (2.0 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2.0 * covariance + c2) / (var_x + var_y + c2)
    return float(np.mean(light * structure))


def _windowed(x: np.ndarray) -> np.ndarray:
    """(H,W,C) -> (H-10,W-10,C): the mean under the window at every place where it fits; one image at a time, so that
    no number depends on its batch."""
    places = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (places / SIGMA) ** 2)
    weights /= weights.sum()
    margin = WINDOW // 2
    filtered = cv2.sepFilter2D(x, cv2.CV_64F, weights, weights)
    return filtered.reshape(x.shape)[margin:-margin, margin:-margin]
