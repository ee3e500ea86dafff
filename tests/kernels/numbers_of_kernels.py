"""What the kernels' tests share: where they run, random numbers, and how far two tensors are apart."""

from __future__ import annotations

import os

import torch
from torch import Tensor

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm; inf for NaN."""
    difference, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    return (difference / size.clamp(min=1e-12)).nan_to_num(nan=float("inf")).item()
