"""A residual sum and its LayerNorm, forward and backward: the sum is normed while it is on the chip.

In separate steps the sum is written, read again to be normed, and in the backward pass two gradients of it are added
in a pass of their own. Gradients of weight and bias are summed by a fixed number of programs in a fixed order.

Suffixes: R rows of a program at a time, C channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_CHANNELS = 4096
TILE = 4096  # numbers a program has on the chip
PROGRAMS = 512  # that share the sums over rows


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """total = x + branch (..., C), and its LayerNorm (arXiv 1607.06450), both contiguous, in the dtype of x.

    weight, bias: (C,), of any type. The sum is rounded to its dtype, then normed in float32, in float64 for float64.
    Strides are read as they are, if the axes but the last can be seen as one; else there is a copy. Differentiable
    once. `kernels.reference.add_layer_norm` is the same in plain PyTorch. Raises ValueError as `why_not` says.
    """
    if reason := why_not(x, branch, weight, bias):
        raise ValueError(reason)
    return _add_layer_norm(x, branch, weight, bias, eps)[:2]


def why_not(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why the kernel cannot take tensors, in one sentence, or None if it can."""
    if x.dim() < 1 or branch.shape != x.shape or branch.dtype != x.dtype:
        given = f"{x.dtype} {tuple(x.shape)} and {branch.dtype} {tuple(branch.shape)}"
        return f"x and branch must be (..., C) of one shape and type, got {given}"
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        return f"weight and bias must be ({x.shape[-1]},), got {tuple(weight.shape)} and {tuple(bias.shape)}"
    if not 1 <= x.shape[-1] <= MAX_CHANNELS:
        return f"the kernel takes 1 to {MAX_CHANNELS} channels, got {x.shape[-1]}"
    for tensor in (x, weight, bias):
        if tensor.dtype not in DTYPES:
            return f"the kernel takes float16, bfloat16, float32 and float64, got {tensor.dtype}"
    if not x.device == branch.device == weight.device == bias.device:
        return f"all must be on one device, got {x.device}, {branch.device}, {weight.device} and {bias.device}"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"the kernel needs a CUDA device, and the tensor is on {x.device.type}"
    return None


# The kernels


@triton.jit
def _load(base, r_R, c_C, keep_RC, sr, sc, ACC: tl.constexpr):
    return tl.load(base + r_R[:, None] * sr + c_C[None, :] * sc, mask=keep_RC, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    x, branch, weight, bias, total, y, mean, rstd, R, xr, xc, br, bc,
    C: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x, branch (R, C) by strides -> total, y (R, C), contiguous; mean, rstd (R,)."""
    r_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c_C = tl.arange(0, BLOCK_C)
    keep_RC = (r_R < R)[:, None] & (c_C < C)[None, :]
    s = _load(x, r_R, c_C, keep_RC, xr, xc, ACC) + _load(branch, r_R, c_C, keep_RC, br, bc, ACC)
    s = s.to(total.dtype.element_ty)
    to = r_R[:, None] * C + c_C[None, :]
    tl.store(total + to, s, mask=keep_RC)
    s = s.to(ACC)
    center = tl.sum(s, axis=1) / C
    apart = tl.where(keep_RC, s - center[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(apart * apart, axis=1) / C + EPS)
    w = tl.load(weight + c_C, mask=c_C < C, other=0.0).to(ACC)
    b = tl.load(bias + c_C, mask=c_C < C, other=0.0).to(ACC)
    tl.store(y + to, (apart * scale[:, None] * w[None, :] + b[None, :]).to(y.dtype.element_ty), mask=keep_RC)
    tl.store(mean + r_R, center, mask=r_R < R)
    tl.store(rstd + r_R, scale, mask=r_R < R)


@triton.jit(do_not_specialize=["R", "rows"])
def _backward_kernel(
    dtotal, dy, total, weight, mean, rstd, dx, parts, R, rows, tr, tc, yr, yc,
    C: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx (R, C), contiguous, the gradient of both summands; parts (programs, 2, C): sums of dy, of dy * normed."""
    program = tl.program_id(0).to(tl.int64)
    c_C = tl.arange(0, BLOCK_C)
    w = tl.load(weight + c_C, mask=c_C < C, other=0.0).to(ACC)
    plain, weighted = tl.zeros((BLOCK_R, BLOCK_C), ACC), tl.zeros((BLOCK_R, BLOCK_C), ACC)
    end = tl.minimum(R, (program + 1) * rows)
    for first in range(program * rows, end, BLOCK_R):
        r_R = first + tl.arange(0, BLOCK_R)
        keep_RC = (r_R < end)[:, None] & (c_C < C)[None, :]
        center = tl.load(mean + r_R, mask=r_R < end, other=0.0)[:, None]
        scale = tl.load(rstd + r_R, mask=r_R < end, other=0.0)[:, None]
        normed = tl.where(keep_RC, (_load(total, r_R, c_C, keep_RC, C, 1, ACC) - center) * scale, 0.0)
        g = _load(dy, r_R, c_C, keep_RC, yr, yc, ACC)
        plain += g
        weighted += g * normed
        g = g * w[None, :]
        d = g - (tl.sum(g, axis=1) / C)[:, None] - normed * (tl.sum(g * normed, axis=1) / C)[:, None]
        d = d * scale + _load(dtotal, r_R, c_C, keep_RC, tr, tc, ACC)
        tl.store(dx + r_R[:, None] * C + c_C[None, :], d.to(dx.dtype.element_ty), mask=keep_RC)
    to = parts + program * 2 * C + c_C
    tl.store(to, tl.sum(plain, axis=0), mask=c_C < C)
    tl.store(to + C, tl.sum(weighted, axis=0), mask=c_C < C)


# Under TRITON_INTERPRET=1 the kernels run on the CPU, as numpy.
INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


# Launching them


def constants(channels: int, dtype: torch.dtype) -> dict[str, object]:
    """The compile-time arguments that both kernels share."""
    block_c = triton.next_power_of_2(channels)
    return {
        "C": channels,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK_R": max(1, TILE // block_c),
        "BLOCK_C": block_c,
        "num_warps": 8,
    }


def _rows(tensor: Tensor) -> Tensor:
    """(R, C), with strides along C that a program can multiply in 32 bits."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.shape[1] * rows.stride(1) < 2**31 else rows.contiguous()


def run_forward(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, total: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill total and y (..., C), contiguous; returns them, and the mean and 1 / standard deviation of each row."""
    R, C = _rows(x).shape
    mean, rstd = (x.new_empty(R, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    if R:
        chosen, (left, right) = constants(C, x.dtype), (_rows(x), _rows(branch))
        programs = (triton.cdiv(R, chosen["BLOCK_R"]),)
        strides = (*left.stride(), *right.stride())
        with torch.cuda.device_of(x):
            _forward_kernel[programs](left, right, weight, bias, total, y, mean, rstd, R, *strides, EPS=eps, **chosen)
    return total, y, mean, rstd


def run_backward(
    dtotal: Tensor, dy: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dx: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill dx (..., C), contiguous; returns it, and the gradients of weight and bias, (C,), in weight's dtype."""
    R, C = _rows(total).shape
    if not R:
        return dx, torch.zeros_like(weight), torch.zeros_like(weight)
    chosen, (left, right) = constants(C, total.dtype), (_rows(dtotal), _rows(dy))
    block = int(chosen["BLOCK_R"])
    rows = triton.cdiv(triton.cdiv(R, block), PROGRAMS) * block
    programs = triton.cdiv(R, rows)
    parts = mean.new_empty(programs, 2, C)
    strides = (*left.stride(), *right.stride())
    with torch.cuda.device_of(total):
        _backward_kernel[(programs,)](
            left, right, total, weight, mean, rstd, dx, parts, R, rows, *strides, **chosen
        )  # fmt: skip
    return dx, parts[:, 1].sum(0).to(weight.dtype), parts[:, 0].sum(0).to(weight.dtype)


# Operators that torch.compile, gradient checkpointing and the like see as one


@torch.library.custom_op(
    "vdm::add_layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor branch, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float):
    total, y = x.new_empty(x.shape), x.new_empty(x.shape)
    return run_forward(x, branch, weight.contiguous(), bias.contiguous(), eps, total, y)


@torch.library.custom_op(
    "vdm::add_layer_norm_backward",
    mutates_args=(),
    schema="(Tensor dtotal, Tensor dy, Tensor total, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
)
def _add_layer_norm_backward(dtotal, dy, total, weight, mean, rstd):
    return run_backward(dtotal, dy, total, weight.contiguous(), mean, rstd, total.new_empty(total.shape))


@_add_layer_norm.register_fake
def _(x, branch, weight, bias, eps):
    R, wide = x[..., 0].numel(), torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(R, dtype=wide), x.new_empty(R, dtype=wide)


@_add_layer_norm_backward.register_fake
def _(dtotal, dy, total, weight, mean, rstd):
    return total.new_empty(total.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    total, _, mean, rstd = output
    ctx.save_for_backward(total, inputs[2], mean, rstd)
    ctx.bias_dtype = inputs[3].dtype


def _differentiate(ctx, dtotal, dy, _mean, _rstd):
    dx, dweight, dbias = _add_layer_norm_backward(dtotal, dy, *ctx.saved_tensors)
    return dx, dx, dweight, dbias.to(ctx.bias_dtype), None


_add_layer_norm.register_autograd(_differentiate, setup_context=_save)
