"""Attention of every kind the model has, and the transformers made of it.

Tokens are (B, T, P, C): video, frame, position, channel. Which axis attends is a matter of view:
space (B*T, P), text (B, T*P) against L tokens that all frames share, time (B*P, T).
Suffixes: B batch, N heads, L / S length of queries / keys, D head dim, T frames, P positions, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vdm.models.layers import (
    FrameGroupNorm,
    Linear,
    VideoGroupNorm,
    as_many,
    from_tokens,
    to_tokens,
    zero_init,
)
from vdm.models.onednn import by_onednn, linear_geglu
from vdm.models.operations import PLAIN, Operations, attend, attend_frames, geglu

# Numbers inside a feed-forward network that a CPU's caches hold.
CACHED = 2**20
# And of tokens that are transformed at once there. More would make of queries, keys and values, and of what is inside
# attention, tensors for which memory is mapped anew each time.
TOKENS = 2**18


class SpatialSelfAttention(nn.Module):
    """Self-attention among the positions of one frame: tokens (B, T, P, C) -> (B, T, P, C). No bias on q, k, v."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.perturbed = False  # each position attends to itself alone
        self.to_qkv = Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = Linear(heads * head_dim, dim)

    def forward(self, x_BTPC: Tensor, context: Tensor) -> Tensor:
        qkv = self.to_qkv(x_BTPC).flatten(0, 1).unflatten(2, (3, self.heads, -1))  # (B*T, P, 3, N, D)
        q, k, v = (one.transpose(1, 2) for one in qkv.unbind(2))
        out = v if self.perturbed else attend(q, k, v)  # (B*T, N, P, D)
        return self.to_out(out.transpose(1, 2).flatten(2).view(*x_BTPC.shape[:3], -1))


class TemporalSelfAttention(SpatialSelfAttention):
    """Self-attention among the frames of one position; the same weights' shapes. `over_frames` is as `attend_frames`;
    a kernel that reads and writes the order of the projections copies nothing."""

    def __init__(self, dim: int, heads: int, head_dim: int, over_frames: Callable[[Tensor], Tensor] = attend_frames):
        super().__init__(dim, heads, head_dim)
        self.over_frames = over_frames

    def forward(self, x_BTPC: Tensor, context: Tensor) -> Tensor:
        qkv = self.to_qkv(x_BTPC).unflatten(3, (3, self.heads, -1))  # (B, T, P, 3, N, D)
        return self.to_out(self.over_frames(qkv).flatten(3))  # (B, T, P, N*D)


class CrossAttention(nn.Module):
    """Attention of all T*P tokens of a video to the L tokens of its text; keys and values are made once per video.

    A video (B, T, P, C) that has k texts (k*B, L, context_dim) gives (k*B, T, P, C).
    """

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(dim, heads * head_dim, bias=False)
        self.to_kv = Linear(context_dim, 2 * heads * head_dim, bias=False)
        self.to_out = Linear(heads * head_dim, dim)

    def forward(self, x_BTPC: Tensor, context_BLC: Tensor) -> Tensor:
        q = as_many(self.to_q(x_BTPC), context_BLC)
        q = q.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, N, T*P, D)
        kv = self.to_kv(context_BLC).unflatten(2, (2, self.heads, -1)).unbind(2)  # 2 x (B, L, N, D)
        out = attend(q, *(one.transpose(1, 2) for one in kv))
        return self.to_out(out.transpose(1, 2).flatten(2).unflatten(1, x_BTPC.shape[1:3]))


class GEGLU(nn.Module):
    """Gated feed-forward, 4*dim wide inside, added to its residual: before + W2 (a * gelu(g)) with [a, g] = W1 x.
    `gate` is as `geglu`."""

    def __init__(self, dim: int, gate: Callable[[Tensor], Tensor] = geglu):
        super().__init__()
        self.linear1 = Linear(dim, 8 * dim)
        self.linear2 = Linear(4 * dim, dim)
        self.gate = gate

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        rows = max(1, CACHED // self.linear1.out_features)
        if torch.is_grad_enabled() or x.device.type != "cpu" or x[..., 0].numel() <= rows:
            return before + self._inside(x)
        # What is inside is eight times as large as x, and where no gradient needs it, it need not leave the caches.
        total = torch.empty_like(before, memory_format=torch.contiguous_format)
        pieces = (tensor.flatten(0, -2).split(rows) for tensor in (x, before, total))
        for some, old, new in zip(*pieces, strict=True):
            torch.add(old, self._inside(some), out=new)
        return total

    def _inside(self, x: Tensor) -> Tensor:
        # By weights, past the layer itself: so only for our own, which nobody has put something in the place of.
        plain = self.gate is geglu and type(self.linear1) is Linear
        if plain and not torch.is_grad_enabled() and by_onednn(x, self.linear1.weight):
            return self.linear2(linear_geglu(self.linear1, x))
        return self.linear2(self.gate(self.linear1(x)))


class AddLayerNorm(nn.LayerNorm):
    """x, branch -> x + branch and its LayerNorm: the end of one residual branch and the start of the next."""

    def __init__(self, dim: int, operations: Operations):
        super().__init__(dim)
        self.operation = operations.add_layer_norm

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.operation(x, branch, self.weight, self.bias, self.eps)


class TransformerBlock(nn.Module):
    """LN, attention, LN, attention, LN, GEGLU, each a residual, on tokens (B, T, P, C).

    Where k texts a video meet them, at the second attention, the tokens become (k*B, T, P, C).
    """

    def __init__(self, dim: int, attn1: nn.Module, attn2: nn.Module, operations: Operations):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2, self.norm3 = (AddLayerNorm(dim, operations) for _ in range(2))
        self.attn1, self.attn2, self.ff = attn1, attn2, GEGLU(dim, operations.geglu)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x, normed = self.norm2(x, self.attn1(self.norm1(x), context))
        branch = self.attn2(normed, context)
        x, normed = self.norm3(as_many(x, branch), branch)
        return self.ff(normed, x)


class _Transformer(nn.Module):
    """Norm, project in, transform tokens, project out, residual: (B, C, T, H, W) -> the same, once a text."""

    alone: int  # the axis of tokens (B, T, P, C) along which none attends to another

    def __init__(self, channels: int, norm: nn.Module, block: TransformerBlock, inner: int):
        super().__init__()
        self.norm = norm
        self.proj_in = Linear(channels, inner)
        self.block = block
        self.proj_out = Linear(inner, channels)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        before, normed = to_tokens(x), to_tokens(self.norm(x))
        one = normed[..., 0].numel() // normed.shape[self.alone] * self.proj_in.out_features
        if torch.is_grad_enabled() or x.device.type != "cpu" or normed.shape[self.alone] * one <= TOKENS:
            return from_tokens(self._changed(before, normed, context), x.shape[3:])
        pieces = (tokens.split(max(1, TOKENS // one), self.alone) for tokens in (before, normed))
        changed = [self._changed(old, some, context) for old, some in zip(*pieces, strict=True)]
        return from_tokens(torch.cat(changed, self.alone), x.shape[3:])

    def _changed(self, before: Tensor, normed: Tensor, context: Tensor) -> Tensor:
        tokens = self.proj_out(self.block(self.proj_in(normed), context))
        return as_many(before, tokens) + tokens


class SpatialTransformer(_Transformer):
    """Self-attention within each frame, then cross-attention to the text. Its GroupNorm is per frame, eps 1e-6."""

    alone = 1

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        context_dim: int,
        groups: int,
        operations: Operations = PLAIN,
    ):
        inner = heads * head_dim
        attn1 = SpatialSelfAttention(inner, heads, head_dim)
        attn2 = CrossAttention(inner, heads, head_dim, context_dim)
        block = TransformerBlock(inner, attn1, attn2, operations)
        super().__init__(channels, FrameGroupNorm(groups, channels, eps=1e-6, operations=operations), block, inner)


class TemporalTransformer(_Transformer):
    """Two self-attentions over frames, at each position. Its GroupNorm reduces over frames too, eps 1e-6.

    The output projection starts at zero: an untrained temporal transformer changes nothing.
    """

    alone = 2

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        groups: int,
        operations: Operations = PLAIN,
    ):
        inner = heads * head_dim
        attn1, attn2 = (TemporalSelfAttention(inner, heads, head_dim, operations.attend_frames) for _ in range(2))
        block = TransformerBlock(inner, attn1, attn2, operations)
        super().__init__(channels, VideoGroupNorm(groups, channels, eps=1e-6, operations=operations), block, inner)
        zero_init(self.proj_out)
