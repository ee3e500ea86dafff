"""The operations that may run fused, in plain PyTorch: attention over frames, gates, norms with what is next to them.

`vdm.models.fused` decides, once for a network, whether these run or the kernels that compute the same. All attention
goes through one function around `scaled_dot_product_attention`, but for that to few keys on a CPU (`by_products`).
Suffixes: B batch, N heads, L / S length of queries / keys, D head dim, T frames, P positions, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# CUDA's fused attention kernels put the batch on a grid axis, which holds no more than 65,535 blocks.
MAX_BATCH = 65_535
SHORT = 128  # keys up to which a CPU is faster with plain products than with its fused kernel, and rounds less
VECTOR = 8  # channels of a group that a CPU reads at a time
SUMMED = 2**16  # numbers from which on `_ByChannels` is faster; with its gradient, four times as many
# Whether the backward pass that is running may come again, by which PyTorch's compiler, too, spares what was saved.
KEEPS_GRAPH = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
# So few clips are faster attended to one by one, on views, than copied first to be attended to at once.
FEW = 4


def attend(q_BNLD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v -> (B, N, L, D), for any batch size and any strides."""
    if q_BNLD.shape[0] > MAX_BATCH:
        pieces = zip(q_BNLD.split(MAX_BATCH), k_BNSD.split(MAX_BATCH), v_BNSD.split(MAX_BATCH), strict=True)
        return torch.cat([attend(q, k, v) for q, k, v in pieces])
    if torch.is_grad_enabled() and suits_products(k_BNSD):
        return by_products(q_BNLD, k_BNSD, v_BNSD)
    # Without gradients the fused kernel, which takes and makes views, is as fast as products of copies.
    return F.scaled_dot_product_attention(q_BNLD, k_BNSD, v_BNSD)


def suits_products(k_BNSD: Tensor) -> bool:
    """Whether so few keys are attended to on a CPU in a type that needs no wider one for its sums."""
    exact = k_BNSD.dtype in (torch.float32, torch.float64)
    return exact and k_BNSD.device.type == "cpu" and k_BNSD.shape[2] <= SHORT


def by_products(q_BNLD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    """`attend` for few keys: the matrix of scores is small, and written out costs less than being fused away."""
    q, k, v = (tensor.flatten(0, 1) for tensor in (q_BNLD, k_BNSD, v_BNSD))
    nothing, scale = q.new_empty(1, 1, 1), q.shape[2] ** -0.5
    scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=scale)  # (B*N, L, S)
    return torch.bmm(scores.softmax(2), v).unflatten(0, q_BNLD.shape[:2])


def attend_frames(qkv: Tensor) -> Tensor:
    """Attention among the frames of each position: packed (B, T, P, 3, N, D) -> (B, T, P, N, D).

    No view of all clips has B and P on one axis. Of one clip there is one, which SDPA's kernels take as it is, so that
    the result alone is copied, and of a single clip nothing. On a CPU, whose caches such strides do not suit, and for
    many clips a packed copy is made, and the projection behind makes another of the result.
    """
    if qkv.device.type != "cpu" and qkv.shape[0] <= FEW:
        return _clip_by_clip(qkv)
    q, k, v = _ByPosition.apply(qkv)
    out = by_products(q, k, v) if suits_products(k) else attend(q, k, v)  # (B*P, N, T, D)
    return out.unflatten(0, (qkv.shape[0], -1)).permute(0, 3, 1, 2, 4)


class _ByPosition(torch.autograd.Function):
    """Packed (B, T, P, 3, N, D) -> q, k, v, each (B*P, N, T, D): one copy, and one of the gradients. PyTorch's own
    gradient of such views stacks the three first, which is another."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> tuple[Tensor, ...]:
        ctx.shape = qkv.shape
        return _positions_first(qkv).contiguous().flatten(1, 2).unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        whole = grads[0].new_empty(ctx.shape)
        for part, grad in zip(_positions_first(whole), grads, strict=True):
            part.copy_(grad.view(part.shape))
        return whole


def _positions_first(qkv: Tensor) -> Tensor:
    return qkv.permute(3, 0, 2, 4, 1, 5)  # (3, B, P, N, T, D)


def _clip_by_clip(qkv: Tensor) -> Tensor:
    outs = [attend(*clip.permute(2, 1, 3, 0, 4)).permute(2, 0, 1, 3) for clip in qkv]  # each (T, P, N, D)
    return torch.stack(outs) if len(outs) > 1 else outs[0][None]


def geglu(x: Tensor) -> Tensor:
    """a * gelu(g) of x = [a, g]: (..., 2W) -> (..., W) (arXiv 2002.05202)."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _GEGLU.apply(x)
    value, gate = x.chunk(2, dim=-1)
    gated = F.gelu(gate)
    return value * gated if torch.is_grad_enabled() else gated.mul_(value)


class _GEGLU(torch.autograd.Function):
    """`geglu`, whose gradient is written over x, but for an x that somebody made or a graph that is kept.

    What is inside is eight times as large as a token, and for new memory a CPU waits longer than for the sums. (Forward
    hooks that keep an x to look at after the backward pass must copy it.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        gated = F.gelu(gate)
        ctx.save_for_backward(x, gated)
        ctx.between = not x.is_leaf
        return value * gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, gated = ctx.saved_tensors
        x = x.detach() if ctx.between and not KEEPS_GRAPH() else x.detach().clone()
        value, gate = x.chunk(2, dim=-1)
        torch.ops.aten.gelu_backward.grad_input(value.mul_(grad), gate, grad_input=gate)
        torch.mul(grad, gated, out=value)
        return x


def add_in_place(x: Tensor, y: Tensor) -> Tensor:
    """x + y, for an x that nothing else will read: in its memory, where no gradient is wanted."""
    return x + y if torch.is_grad_enabled() or x.dtype != y.dtype else x.add_(y)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """GroupNorm (arXiv 1803.08494) of (N, C, H, W), then SiLU if asked for."""
    by_channels = _suits_channels(x, groups) and weight.dtype == torch.float32 and not torch.compiler.is_compiling()
    normed = (_ByChannels.apply if by_channels else F.group_norm)(x, groups, weight, bias, eps)
    return F.silu(normed, inplace=not torch.is_grad_enabled()) if silu else normed


def _suits_channels(x: Tensor, groups: int) -> bool:
    """Whether PyTorch's own GroupNorm is slow. Below 1024 pixels it reads, on a CPU, few channels at each; from there
    on it sums up all channels, but not in its gradient. (Small tensors are not worth our many calls.)"""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[1] // groups >= VECTOR:
        return False
    gradients, pixels = torch.is_grad_enabled(), x.shape[2:].numel()
    return x.numel() >= SUMMED * 4 if gradients else x.numel() >= SUMMED and pixels < 1024


class _ByChannels(torch.autograd.Function):
    """GroupNorm, and its gradient, by sums of each channel in place of each group's, whose few channels are no vector
    for a CPU. With y = scale * x + shift the gradient of x is scale * dy + b * x + k, with numbers of each group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)  # (N, H*W, C)
        normed = rows.square()
        sums = torch.stack([rows.sum(1), normed.sum(1)])
        mean, square = sums.unflatten(2, (groups, -1)).mean(3).div_(rows.shape[1])  # (N, groups)
        rstd = (square - mean * mean).clamp_(min=0).add_(eps).rsqrt_()
        scale = (rstd[:, :, None] * weight.view(groups, -1)).flatten(1)
        shift = bias - mean.repeat_interleave(x.shape[1] // groups, 1) * scale
        torch.addcmul(shift[:, None], rows, scale[:, None], out=normed)
        ctx.save_for_backward(x, weight, mean, rstd)
        return normed.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        rows, dy = (one.permute(0, 2, 3, 1).flatten(1, 2) for one in (x, grad))
        of_x = dy * rows
        sums = torch.stack([of_x.sum(1), dy.sum(1)])  # (2, N, C)
        by_weight = sums * weight
        products, plain = by_weight.unflatten(2, (mean.shape[1], -1)).sum(3)  # (N, groups)
        count = rows.shape[1] * (rows.shape[2] // mean.shape[1])
        b = (plain * mean - products) * rstd**3 / count
        k = -b * mean - plain * rstd / count
        of_groups = torch.stack([b, k, mean, rstd])
        b, k, mean, rstd = of_groups.repeat_interleave(rows.shape[2] // mean.shape[1], 2)  # (N, C)
        torch.addcmul(k[:, None], dy, (rstd * weight)[:, None], out=of_x)
        of_x.addcmul_(rows, b[:, None])
        of_weight = ((sums[0] - sums[1] * mean) * rstd).sum(0)
        return of_x.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2), None, of_weight, sums[1].sum(0), None


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + branch, and its LayerNorm (arXiv 1607.06450) over the last axis."""
    total = x + branch
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


class Operations(NamedTuple):
    """The four, each as the function of its name here."""

    attend_frames: Callable[[Tensor], Tensor]
    geglu: Callable[[Tensor], Tensor]
    group_norm: Callable[[Tensor, int, Tensor, Tensor, float, bool], Tensor]
    add_layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


PLAIN = Operations(attend_frames, geglu, group_norm, add_layer_norm)
