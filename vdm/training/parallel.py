"""What is done to a model from outside: activation checkpointing."""

from __future__ import annotations

from functools import partial

from torch import nn

from vdm.training.recompute import blocks, recomputed
from vdm.training.settings import Recompute


def checkpoint_activations(model: nn.Module, *, how: bool | Recompute) -> None:
    """Compute activations again in the backward pass instead of keeping them; results do not change.

    `how` is `training.gradient_checkpointing`: nothing, what is cheap, or whole blocks.
    """
    if how not in ("cheap", "block"):
        return
    for block in blocks(model):
        block.forward = partial(recomputed, block, block.forward, how)
