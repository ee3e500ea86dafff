"""The kernels' oracles: what each computes, in a few lines of plain PyTorch, with the same signature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def temporal_attention(qkv: Tensor, *, key_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention among the frames of each position: qkv (B, F, P, 3, H, D) -> (B, F, P, H, D), in qkv's dtype.

    softmax(scale * q k^T) v, with scale 1 / sqrt(D) by default; at least in float32, and in float64 for float64.
    `key_mask` (B, F), bool: the frames of a clip that may be attended to; the keys and values of the others count for
    nothing, whatever they hold. Where a clip has no such frame, its output and all its gradients are zero.
    """
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    q, k, v = wide.permute(3, 0, 2, 4, 1, 5)  # 3 x (B, P, H, F, D)
    if key_mask is None:
        weights = (scale * q @ k.transpose(-1, -2)).softmax(-1)
    else:
        keep = key_mask[:, None, None, None, :]  # (B, 1, 1, 1, F)
        k, v = (x.masked_fill(~keep.transpose(-1, -2), 0.0) for x in (k, v))
        scores = (scale * q @ k.transpose(-1, -2)).masked_fill(~keep, torch.finfo(wide.dtype).min)
        weights = scores.softmax(-1) * keep  # the product is for clips without any: their softmax is uniform
    return (weights @ v).permute(0, 3, 1, 2, 4).to(qkv.dtype)


def geglu(x: Tensor) -> Tensor:
    """a * gelu(g) of x = [a, g] (..., 2W) -> (..., W), with the exact gelu; at least in float32 (arXiv 2002.05202)."""
    value, gate = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """GroupNorm of (N, C, ...), then SiLU if `silu`; at least in float32 (arXiv 1803.08494)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    split = wide.unflatten(1, (groups, -1)).flatten(2)  # (N, G, C / G * ...)
    variance, mean = torch.var_mean(split, dim=2, keepdim=True, correction=0)
    normed = ((split - mean) / (variance + eps).sqrt()).view(wide.shape)
    affine = [parameter.to(wide.dtype).view(-1, *[1] * (x.dim() - 2)) for parameter in (weight, bias)]
    y = normed * affine[0] + affine[1]
    return (y * torch.sigmoid(y) if silu else y).to(x.dtype)


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + branch, and its LayerNorm over the last axis, the latter at least in float32 (arXiv 1607.06450)."""
    total = x + branch
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=-1, keepdim=True, correction=0)
    normed = (wide - mean) / (variance + eps).sqrt()
    return total, (normed * weight.to(wide.dtype) + bias.to(wide.dtype)).to(x.dtype)
