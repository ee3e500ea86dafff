"""Networks that measure run in full float32, whatever the process around them has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no TF32 (which torch allows cuDNN by default); what was set before is set again."""
    before = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


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
