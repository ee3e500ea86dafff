"""Frames as CLIP wants to see them: resized by Pillow's rules, made square, and normalised."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vdm.metrics.bicubic import pillow_bicubic
from vdm.metrics.checks import require_frames

Fit = Literal["crop", "squash", "pad"]
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(
    frames: Tensor,
    *,
    size: int,
    fit: Fit = "crop",
    antialias: bool = True,
    mean: tuple[float, ...] = OPENAI_MEAN,
    std: tuple[float, ...] = OPENAI_STD,
) -> Tensor:
    """Clips (B, T, H, W, 3) uint8 -> (B, T, 3, size, size) float32, normalised.

    fit: "crop" is the published way, the short side to `size` and then the centre; it hides the sides of a wide clip,
    where things come in. "pad" shows all of it between black bars, "squash" all of it out of shape.
    antialias=False is VBench's resizing: torch's bicubic, rounded to whole grey levels.
    """
    require_frames(frames)
    if fit not in ("crop", "squash", "pad"):
        raise ValueError(f"fit must be crop, squash or pad, got {fit!r}")
    height, width = _resized(frames.shape[2], frames.shape[3], size, fit)
    channels_first = frames.movedim(-1, 2).contiguous()  # (B, T, 3, H, W)
    resize = pillow_bicubic if antialias else torch_bicubic
    square = _squared(resize(channels_first, height=height, width=width), size)
    # /255 first, then the two steps of Normalize, in float32: what torchvision does, to the bit.
    middle, spread = (square.new_tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))
    return (square.float() / 255 - middle) / spread


def torch_bicubic(frames: Tensor, *, height: int, width: int) -> Tensor:
    """frames uint8 (..., H, W) -> uint8 (..., height, width): bicubic with a = -3/4 and no antialiasing."""
    single = frames.flatten(0, -3)[:, None].float()  # (n, 1, H, W)
    resized = F.interpolate(single, size=(height, width), mode="bicubic", align_corners=False)
    return resized.clamp(0, 255).round().to(torch.uint8)[:, 0].unflatten(0, frames.shape[:-2])


def short_side(height: int, width: int, size: int) -> tuple[int, int]:
    """The height and width at which the shorter of the two is `size`; the longer is rounded down, as torchvision's."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _resized(height: int, width: int, size: int, fit: Fit) -> tuple[int, int]:
    if fit == "squash":
        return size, size
    if fit == "crop":
        return short_side(height, width, size)
    ratio = max(height, width) / size  # open_clip rounds here, where torchvision cuts off
    return max(round(height / ratio), 1), max(round(width / ratio), 1)


def _squared(frames: Tensor, size: int) -> Tensor:
    """The centre (..., size, size) of frames (..., H, W); what is missing is black."""
    height, width = frames.shape[-2:]
    down, right = max(size - height, 0), max(size - width, 0)
    padded = F.pad(frames, (right // 2, (right + 1) // 2, down // 2, (down + 1) // 2))
    top, left = (round((padded.shape[axis] - size) / 2) for axis in (-2, -1))
    return padded[..., top : top + size, left : left + size]
