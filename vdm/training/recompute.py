"""What the backward pass computes again instead of keeping: all of a block, or only what is cheap.

A network's memory is mostly what its norms, activations, gates, dropouts, copies and sums leave behind, and these cost
next to nothing to compute again from the outputs of the matrix products, convolutions and attentions between them. So
`cheap` keeps those outputs alone, and no expensive operation runs twice; `block` (Chen et al., arXiv 1604.06174) keeps
the input of a block alone, and everything runs twice. Random draws are repeated as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.utils.checkpoint
from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from vdm.models.attention import TemporalTransformer
from vdm.models.blocks import DecoderLayer, UNetLayer
from vdm.models.vae import AttentionBlock2D, ResBlock2D, TimeMix

# What runs again at one go. A layer of the decoder begins at its two inputs, for what it makes of them is larger.
BLOCKS = (DecoderLayer, UNetLayer, TemporalTransformer, ResBlock2D, AttentionBlock2D, TimeMix, ResidualAttentionBlock)
CHEAP = ("geglu", "group_norm", "add_layer_norm", "clip_mask")  # of our own operators
# Of PyTorch's own operations; any other library's counts as expensive too.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "_convolution", "mkldnn_convolution")
ATTENTION = ("_scaled_dot_product_", "_flash_attention", "_efficient_attention", "_cudnn_attention")


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks of a model that are recomputed as one."""
    for child in model.children():
        if isinstance(child, BLOCKS):
            yield child
        else:
            yield from blocks(child)


def is_expensive(operation: Any) -> bool:
    """Whether an operation, such as torch.ops.aten.mm.default, is one that `cheap` never repeats."""
    name = operation.overloadpacket.__name__
    if operation.namespace == "vdm" and name in CHEAP:
        return False
    return operation.namespace not in ("aten", "prim") or name in PRODUCTS or name.startswith(ATTENTION)


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_expensive(operation) else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_what_is_expensive() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def recomputed(
    module: nn.Module, forward: Callable[..., Any], how: Literal["cheap", "block"], *args: Any, **kwargs: Any
) -> Any:
    """forward(*args, **kwargs), of which the backward pass repeats what `how` says; in evaluation nothing."""
    if not (module.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    again = partial(torch.utils.checkpoint.checkpoint, partial(forward, **kwargs), *args, use_reentrant=False)
    return again(context_fn=_keep_what_is_expensive) if how == "cheap" else again()
