"""Frames to a square of the size that a network takes, by the three bilinear rules that published numbers were made by.

FVD moves with the rule: at 256 to 224 pixels smooth images differ by 1 to 2 grey levels, noise by 7. So each is named.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Fit = Literal["squash", "crop"]
Interp = Literal["torch", "tf1", "aa"]


def resize(
    frames: Tensor | npt.NDArray[np.uint8], size: int, *, fit: Fit = "squash", interp: Interp = "torch"
) -> Tensor:
    """uint8 (..., H, W, 3) -> float32 (..., 3, size, size) in 0..255, not rounded; each frame by itself.

    fit: "squash" brings each side to `size`; "crop" the shorter one, the other in proportion (rounded up), and keeps
    the middle. interp: "torch" samples at pixel centres, which skips pixels where it shrinks by more than 2; "aa" is
    that with a triangle as wide as the shrinking (PIL's); "tf1" samples at pixel corners (TensorFlow 1's
    resize_bilinear). Where the size is right already all three change nothing.
    Raises ValueError for other dtypes, shapes and names.
    """
    frames = as_uint8(frames)
    if frames.dim() < 3 or 0 in frames.shape[-3:]:
        raise ValueError(f"frames are (..., H, W, 3), not {tuple(frames.shape)}")
    if fit not in get_args(Fit) or interp not in get_args(Interp) or size < 1:
        raise ValueError(f"there is no fit {fit!r} with interp {interp!r} to size {size}")
    *batch, height, width, channels = frames.shape
    # Contiguous first: strides choose torch's routine, and so the last bit.
    images = frames.reshape(-1, height, width, channels).movedim(-1, 1).float().contiguous()
    target = (size, size) if fit == "squash" else _covering(height, width, size)
    images = _tf1(images, target) if interp == "tf1" else _torch(images, target, antialias=interp == "aa")
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return images[..., top : top + size, left : left + size].reshape(*batch, channels, size, size)


def as_uint8(frames: Tensor | npt.NDArray[np.uint8]) -> Tensor:
    """The same memory as a tensor. Raises ValueError for what is not uint8 with 3 channels in the last place."""
    tensor = torch.as_tensor(frames)
    if tensor.dtype != torch.uint8 or tensor.dim() == 0 or tensor.shape[-1] != 3:
        raise ValueError(f"frames are uint8 RGB (..., H, W, 3), not {tensor.dtype} {tuple(tensor.shape)}")
    return tensor


def _covering(height: int, width: int, size: int) -> tuple[int, int]:
    """The shape whose shorter side is `size`."""
    short = min(height, width)
    return -(-height * size // short), -(-width * size // short)


def _torch(images: Tensor, target: tuple[int, int], *, antialias: bool) -> Tensor:
    if len(images) == 0:
        return images.new_empty(0, images.shape[1], *target)
    return F.interpolate(images, size=target, mode="bilinear", align_corners=False, antialias=antialias)


def _tf1(images: Tensor, target: tuple[int, int]) -> Tensor:
    """Output pixel i lies at i * in / out, between its two neighbours; what lies beyond the last pixel is the last."""
    for dim, count in zip((-2, -1), target, strict=True):
        length = images.shape[dim]
        place = torch.arange(count, dtype=torch.float32, device=images.device) * (length / count)
        before = place.long().clamp(max=length - 1)
        share = (place - before).reshape(-1, *[1] * (-1 - dim))
        low = images.index_select(dim, before)
        high = images.index_select(dim, (before + 1).clamp(max=length - 1))
        images = low + (high - low) * share
    return images
