"""Decoding of large frames in overlapping squares that are blended, so that memory does not grow with the frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LEAST_TILE = 8  # latents; of smaller ones hardly anything is left between the borders
OVERLAP = 4  # a quarter of a tile is shared with the next


def decode_tiles(decode: Callable[[Tensor], Tensor], tile: int, factor: int, z: Tensor) -> Tensor:
    """Latents (B, C, T, h, w) -> (B, 3, T, factor*h, factor*w), from squares of `tile` latents.

    Where squares overlap, their weights go linearly from one to the other.
    """
    height, width = z.shape[3:]
    total: Tensor | None = None
    weights = torch.zeros(height * factor, width * factor, device=z.device)
    for top, bottom in _spans(height, tile):
        for left, right in _spans(width, tile):
            piece = decode(z[..., top:bottom, left:right])
            if total is None:
                wide = torch.promote_types(piece.dtype, torch.float32)
                total = piece.new_zeros(*piece.shape[:3], *weights.shape, dtype=wide)
            window = _ramps(top, bottom, height, tile, factor)[:, None] * _ramps(left, right, width, tile, factor)
            window = window.to(z.device)
            rows, columns = slice(top * factor, bottom * factor), slice(left * factor, right * factor)
            total[..., rows, columns] += piece * window
            weights[rows, columns] += window
    assert total is not None
    return (total / weights).to(z.dtype)


def _spans(length: int, tile: int) -> Iterator[tuple[int, int]]:
    """Of tiles that cover 0 to length, each as long as a tile where there is room."""
    step = tile - tile // OVERLAP
    for start in range(0, max(1, length - tile // OVERLAP), step):
        end = min(start + tile, length)
        yield max(0, end - tile), end


def _ramps(start: int, end: int, length: int, tile: int, factor: int) -> Tensor:
    """The weight of each pixel along one axis: 1, less near ends that are no borders of the frame."""
    shared = max(1, tile // OVERLAP * factor)
    along = torch.arange((end - start) * factor, dtype=torch.float32, device="cpu") + 0.5
    rising = (along / shared).clamp(max=1.0) if start > 0 else torch.ones_like(along)
    falling = (along.flip(0) / shared).clamp(max=1.0) if end < length else torch.ones_like(along)
    return rising * falling
