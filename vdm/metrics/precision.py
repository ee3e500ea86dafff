"""Networks that measure run in full float32, whatever the process around them has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
