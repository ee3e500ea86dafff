"""What every network that looks at frames asks of the clips that go in, and of the features that come out."""

from __future__ import annotations

import torch
from torch import Tensor


def require_frames(frames: Tensor) -> None:
    """Raises ValueError unless these are clips as they lie on disk: uint8 (B, T, H, W, 3), none of it empty."""
    if frames.dtype != torch.uint8 or frames.dim() != 5 or frames.shape[-1] != 3 or not frames.numel():
        raise ValueError(f"clips must be uint8 (B, T, H, W, 3), got {frames.dtype} {tuple(frames.shape)}")


def unit(features: Tensor) -> Tensor:
    """features (..., D) float -> float32 of length 1. Raises ValueError where one is NaN, infinite or zero."""
    lengths = features.float().norm(dim=-1, keepdim=True)
    if not (lengths.isfinite() & (lengths > 0)).all():
        raise ValueError("a feature is NaN, infinite or zero; a clip or the weights are damaged")
    return features.float() / lengths
