"""Pillow's antialiased bicubic resizing, to the bit and on any device: what CLIP's own preprocessing does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BITS = 22  # Pillow's fixed-point weights: 32 bits, less 8 for a pixel and 2 for what overshoots


def pillow_bicubic(frames: Tensor, *, height: int, width: int) -> Tensor:
    """frames uint8 (..., H, W) -> uint8 (..., height, width), what PIL.Image.resize gives with BICUBIC.

    Pillow widens the filter when it shrinks (antialiasing), resizes the width first, then the height, and rounds to
    whole grey levels after each. Its weights are whole numbers, and sums of these are exact in float64 in any order.
    """
    if frames.dtype != torch.uint8:
        raise ValueError(f"frames must be uint8, got {frames.dtype}")
    wide = _in_fixed_point(frames.double() @ _weights(frames.shape[-1], width).to(frames.device).T)
    return _in_fixed_point(_weights(frames.shape[-2], height).to(frames.device) @ wide).to(torch.uint8)


def _in_fixed_point(sums: Tensor) -> Tensor:
    return ((sums + 2 ** (_BITS - 1)) / 2**_BITS).floor().clamp(0, 255)


def _weights(size: int, wanted: int) -> Tensor:
    """Each new pixel's weights (wanted, size) float64, in units of 2^-22."""
    scale = size / wanted
    stretch = max(scale, 1.0)
    weights = torch.zeros(wanted, size, dtype=torch.float64)
    for row in range(wanted):
        centre = (row + 0.5) * scale
        first = max(int(centre - 2 * stretch + 0.5), 0)
        last = min(int(centre + 2 * stretch + 0.5), size)
        values = [_cubic((x - centre + 0.5) / stretch) for x in range(first, last)]
        total = sum(values)
        fixed = [math.trunc(v / total * 2**_BITS + math.copysign(0.5, v)) for v in values]
        weights[row, first:last] = torch.tensor(fixed, dtype=torch.float64)
    return weights


def _cubic(x: float) -> float:
    """Keys' kernel with a = -1/2 (torch's own bicubic without antialiasing has -3/4)."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0
