"""GEGLU, a * gelu(g) of a projection's output [a, g], forward and backward: each reads once and writes once.

In separate steps the gelu's output goes to memory and comes back, and the backward pass joins the two halves of the
gradient by a copy; the two halves are a third of the bytes of a training step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TILE = 2048  # elements a program


def geglu(x: Tensor) -> Tensor:
    """a * gelu(g) of x = [a, g] (..., 2W) -> (..., W), contiguous; the exact gelu (arXiv 2002.05202).

    Computed in float32, in float64 for float64. Strides are read as they are, if the axes but the last can be seen as
    one; else x is copied. Differentiable once. `kernels.reference.geglu` is the same in plain PyTorch. Raises
    ValueError for an odd last axis, another type of number, and a device that the kernel cannot run on.
    """
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"x must be (..., 2W), got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"the kernel takes float16, bfloat16, float32 and float64, got {x.dtype}")
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"the kernel needs a CUDA device, and the tensor is on {x.device.type}")
    return _geglu(x)


# The kernels


@triton.jit
def _place(R, W, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows (r, 1), columns (1, w) and which are there. One grid axis holds all programs: the others end at 65,535."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(W, BLOCK_W)
    rows = (program // across * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    columns = (program % across * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    return rows, columns, (rows < R) & (columns < W)


@triton.jit
def _normal(gate):
    """The standard normal distribution up to `gate`."""
    return 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    x, out, R, W, sr, sw, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """x (R, 2W) by strides -> out (R, W), contiguous."""
    rows, columns, keep = _place(R, W, BLOCK_R, BLOCK_W)
    at = x + rows * sr + columns * sw
    value = tl.load(at, mask=keep, other=0.0).to(ACC)
    gate = tl.load(at + W * sw, mask=keep, other=0.0).to(ACC)
    gated = value * gate * _normal(gate)
    tl.store(out + rows * W + columns, gated.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(
    grad, x, dx, R, W, gr, gw, sr, sw, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """grad (R, W) and x (R, 2W) by strides -> dx (R, 2W), contiguous."""
    rows, columns, keep = _place(R, W, BLOCK_R, BLOCK_W)
    at = x + rows * sr + columns * sw
    value = tl.load(at, mask=keep, other=0.0).to(ACC)
    gate = tl.load(at + W * sw, mask=keep, other=0.0).to(ACC)
    d = tl.load(grad + rows * gr + columns * gw, mask=keep, other=0.0).to(ACC)
    normal = _normal(gate)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    to = dx + rows * (2 * W) + columns
    tl.store(to, (d * gate * normal).to(dx.dtype.element_ty), mask=keep)
    tl.store(to + W, (d * value * (normal + gate * density)).to(dx.dtype.element_ty), mask=keep)


# Under TRITON_INTERPRET=1 the kernels run on the CPU, as numpy.
INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


# Launching them


def constants(width: int, dtype: torch.dtype) -> dict[str, object]:
    """The compile-time arguments of either kernel."""
    block_w = min(256, triton.next_power_of_2(width))
    return {
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK_R": TILE // block_w,
        "BLOCK_W": block_w,
        "num_warps": 4,
    }


def _launch(kernel, tensors, x, out):
    """`tensors` and x as (rows, columns) of any strides; `out` is filled and returned."""
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (*tensors, x)]
    flat = [tensor if tensor.shape[1] * tensor.stride(1) < 2**31 else tensor.contiguous() for tensor in flat]
    R, W = flat[-1].shape[0], flat[-1].shape[1] // 2
    if out.numel():
        chosen = constants(W, x.dtype)
        programs = triton.cdiv(R, chosen["BLOCK_R"]) * triton.cdiv(W, chosen["BLOCK_W"])
        strides = [stride for tensor in flat for stride in tensor.stride()]
        with torch.cuda.device_of(x):
            kernel[(programs,)](*flat, out, R, W, *strides, **chosen)
    return out


def run_forward(x: Tensor, out: Tensor) -> Tensor:
    """Fill `out` (..., W), contiguous, and return it."""
    return _launch(_forward_kernel, (), x, out)


def run_backward(grad: Tensor, x: Tensor, dx: Tensor) -> Tensor:
    """Fill `dx` (..., 2W), contiguous, and return it."""
    return _launch(_backward_kernel, (grad,), x, dx)


# Operators that torch.compile, gradient checkpointing and the like see as one


@torch.library.custom_op("vdm::geglu", mutates_args=(), schema="(Tensor x) -> Tensor")
def _geglu(x: Tensor) -> Tensor:
    return run_forward(x, _empty_out(x))


@torch.library.custom_op("vdm::geglu_backward", mutates_args=(), schema="(Tensor grad, Tensor x) -> Tensor")
def _geglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return run_backward(grad, x, x.new_empty(x.shape))


def _empty_out(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@_geglu.register_fake
def _(x: Tensor) -> Tensor:
    return _empty_out(x)


@_geglu_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad: Tensor):
    return _geglu_backward(grad, *ctx.saved_tensors)


_geglu.register_autograd(_differentiate, setup_context=_save)
