"""Whether subject and background stay the same through a clip: likeness to the frame before and to the first.

Huang et al. 2023 (VBench, arXiv:2311.17982). A clip that stands still has 1: to be read beside how much it moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdm.metrics.checks import unit


def subject_consistency(features: Tensor) -> Tensor:
    """DINO's features (B, T, D) of at least two frames -> (B,) float64 in [0, 1].

    The mean over t >= 1 of (max(0, cos(f[t-1], f[t])) + max(0, cos(f[0], f[t]))) / 2. Raises ValueError for another
    shape, and where a feature is NaN, infinite or zero.
    """
    return _consistency(features)


def background_consistency(features: Tensor) -> Tensor:
    """The same of CLIP ViT-B/32's features, from `Clip.frames(..., antialias=False)` for VBench's numbers."""
    return _consistency(features)


def _consistency(features: Tensor) -> Tensor:
    if features.dim() != 3 or features.shape[1] < 2:
        raise ValueError(f"consistency needs features (B, T, D) of two frames or more, got {tuple(features.shape)}")
    f = torch.nn.functional.normalize(unit(features).double(), dim=-1)
    to_last = (f[:, 1:] * f[:, :-1]).sum(-1).clamp(0, 1)  # (B, T - 1)
    to_first = (f[:, 1:] * f[:, :1]).sum(-1).clamp(0, 1)
    return ((to_last + to_first) / 2).mean(1)
