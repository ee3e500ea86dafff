"""What is done to a model from outside: activation checkpointing."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.utils.checkpoint
from torch import nn

from vdm.models.blocks import UNetLayer


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute every UNet layer in the backward pass instead of keeping its activations; results do not change."""
    for module in model.modules():
        if isinstance(module, UNetLayer):
            module.forward = partial(_recomputed, module, module.forward)  # type: ignore[method-assign]


def _recomputed(module: nn.Module, forward: Any, *args: Any) -> Any:
    if not module.training:
        return forward(*args)
    return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False)
