"""Attention of every kind the model has, all through one function around `scaled_dot_product_attention`.

Tokens are (B, T, P, C): video, frame, position, channel. Which axis attends is a matter of view:
space (B*T, P), text (B, T*P) against L tokens that all frames share, time (B*P, T).
Suffixes: B batch, N heads, L / S length of queries / keys, D head dim, T frames, P positions, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vdm.models.layers import FrameGroupNorm, VideoGroupNorm, from_tokens, to_tokens, zero_init

# CUDA's fused attention kernels put the batch on a grid axis, which holds no more than 65,535 blocks.
MAX_BATCH = 65_535
# On a CPU the fused kernel's tiles are longer than these sequences: plain products win, and by far in the backward.
SHORT = 128


def attend(q_BNLD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v -> (B, N, L, D), for any batch size and any strides."""
    if q_BNLD.shape[0] > MAX_BATCH:
        pieces = zip(q_BNLD.split(MAX_BATCH), k_BNSD.split(MAX_BATCH), v_BNSD.split(MAX_BATCH), strict=True)
        return torch.cat([attend(q, k, v) for q, k, v in pieces])
    if q_BNLD.device.type == "cpu" and k_BNSD.shape[2] <= SHORT:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q_BNLD, k_BNSD, v_BNSD)
    return F.scaled_dot_product_attention(q_BNLD, k_BNSD, v_BNSD)


def attend_frames(qkv: Tensor) -> Tensor:
    """Attention among the frames of each position: packed (B, T, P, 3, N, D) -> (B, T, P, N, D), a view of an output
    with the heads outside. One copy in, for no view has B and P, or P and N, on one axis."""
    B, _, P, *_ = qkv.shape
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # 3 x (B*P, N, T, D): the copy in
    return attend(q, k, v).unflatten(0, (B, P)).permute(0, 3, 1, 2, 4)


def geglu(x: Tensor) -> Tensor:
    """a * gelu(g) of x = [a, g]: (..., 2W) -> (..., W) (arXiv 2002.05202)."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


class SpatialSelfAttention(nn.Module):
    """Self-attention among the positions of one frame: tokens (B, T, P, C) -> (B, T, P, C). No bias on q, k, v."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)

    def forward(self, x_BTPC: Tensor, context: Tensor) -> Tensor:
        qkv = self.to_qkv(x_BTPC).flatten(0, 1).unflatten(2, (3, self.heads, -1))  # (B*T, P, 3, N, D)
        out = attend(*qkv.permute(2, 0, 3, 1, 4))  # (B*T, N, P, D)
        return self.to_out(out.transpose(1, 2).flatten(2).view(*x_BTPC.shape[:3], -1))


class TemporalSelfAttention(SpatialSelfAttention):
    """Self-attention among the frames of one position; the same weights' shapes. `over_frames` is as `attend_frames`,
    which takes one copy in and one out; a kernel that reads and writes the order of the projections takes none."""

    def __init__(self, dim: int, heads: int, head_dim: int, over_frames: Callable[[Tensor], Tensor] = attend_frames):
        super().__init__(dim, heads, head_dim)
        self.over_frames = over_frames

    def forward(self, x_BTPC: Tensor, context: Tensor) -> Tensor:
        qkv = self.to_qkv(x_BTPC).unflatten(3, (3, self.heads, -1))  # (B, T, P, 3, N, D)
        return self.to_out(self.over_frames(qkv).flatten(3))  # (B, T, P, N*D): the copy out, if any


class CrossAttention(nn.Module):
    """Attention of all T*P tokens of a video to the L tokens of its text; keys and values are made once per video."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)

    def forward(self, x_BTPC: Tensor, context_BLC: Tensor) -> Tensor:
        q = self.to_q(x_BTPC).flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, N, T*P, D)
        kv = self.to_kv(context_BLC).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 2 x (B, N, L, D)
        out = attend(q, kv[0], kv[1])
        return self.to_out(out.transpose(1, 2).flatten(2).view(*x_BTPC.shape[:3], -1))


class GEGLU(nn.Module):
    """Gated feed-forward, 4*dim wide inside: W2 (a * gelu(g)) with [a, g] = W1 x. `gate` is as `geglu`."""

    def __init__(self, dim: int, gate: Callable[[Tensor], Tensor] = geglu):
        super().__init__()
        self.linear1 = nn.Linear(dim, 8 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.gate(self.linear1(x)))


class TransformerBlock(nn.Module):
    """LN, attention, LN, attention, LN, GEGLU, each a residual, on tokens (B, T, P, C)."""

    def __init__(self, dim: int, attn1: nn.Module, attn2: nn.Module, gate: Callable[[Tensor], Tensor]):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1, self.attn2, self.ff = attn1, attn2, GEGLU(dim, gate)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), context)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class _Transformer(nn.Module):
    """Norm, project in, transform tokens, project out, residual: (B, C, T, H, W) -> (B, C, T, H, W)."""

    def __init__(self, channels: int, norm: nn.Module, block: TransformerBlock, inner: int):
        super().__init__()
        self.norm = norm
        self.proj_in = nn.Linear(channels, inner)
        self.block = block
        self.proj_out = nn.Linear(inner, channels)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        tokens = self.block(self.proj_in(to_tokens(self.norm(x))), context)
        return x + from_tokens(self.proj_out(tokens), x.shape[3:])


class SpatialTransformer(_Transformer):
    """Self-attention within each frame, then cross-attention to the text. Its GroupNorm is per frame, eps 1e-6."""

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        context_dim: int,
        groups: int,
        gate: Callable[[Tensor], Tensor] = geglu,
    ):
        inner = heads * head_dim
        attn1 = SpatialSelfAttention(inner, heads, head_dim)
        attn2 = CrossAttention(inner, heads, head_dim, context_dim)
        block = TransformerBlock(inner, attn1, attn2, gate)
        super().__init__(channels, FrameGroupNorm(groups, channels, eps=1e-6), block, inner)


class TemporalTransformer(_Transformer):
    """Two self-attentions over frames, at each position. Its GroupNorm reduces over frames too, eps 1e-6.

    The output projection starts at zero: an untrained temporal transformer changes nothing.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        groups: int,
        over_frames: Callable[[Tensor], Tensor] = attend_frames,
        gate: Callable[[Tensor], Tensor] = geglu,
    ):
        inner = heads * head_dim
        attn1, attn2 = (TemporalSelfAttention(inner, heads, head_dim, over_frames) for _ in range(2))
        block = TransformerBlock(inner, attn1, attn2, gate)
        super().__init__(channels, VideoGroupNorm(groups, channels, eps=1e-6), block, inner)
        zero_init(self.proj_out)
