"""GroupNorm, and SiLU if wanted, of tensors whose channels lie last, forward and backward.

One pass sums, one applies: x is read twice and written once, and what SiLU needs is computed again from x. The rows of
one instance are shared out among programs, since there are far fewer groups than a GPU has units; each leaves its
sums per channel, which are put together in a fixed order. So the bits do not depend on the GPU, nor on chance. A
program adds up its tiles element by element, and across rows only once, at its end: between two loads nothing waits.

Suffixes: R rows (positions), C channels, of a program; S splits of an instance's rows; G groups; W channels of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BLOCK_R, BLOCK_C = 32, 64  # rows and channels of a tile
SUMMING, APPLYING = 2048, 8192  # programs at least, where there are rows for them: many loads have to be under way
BLOCK_S = 64  # splits that are put together at a time
MAX_WIDTH = 256  # channels of a group


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """GroupNorm (arXiv 1803.08494) of x (N, C, ...), then SiLU if `silu`: the same shape and dtype, channels last.

    weight, bias: (C,), of any type. Computed in float32, in float64 for float64. Strides are read as they are, if the
    axes behind the channels can be seen as one; else x is copied. Differentiable once. `kernels.reference.group_norm`
    is the same in plain PyTorch. Raises ValueError for channels that do not divide into groups, other types of
    numbers, and a device that the kernel cannot run on.
    """
    if reason := why_not(x, groups, weight, bias):
        raise ValueError(reason)
    rows = x.flatten(2).transpose(1, 2)  # (N, R, C)
    y = _group_norm(rows, groups, weight, bias, eps, silu)[0]
    return y.transpose(1, 2).unflatten(2, x.shape[2:])


def why_not(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> str | None:
    """Why the kernel cannot take a tensor, in one sentence, or None if it can."""
    if x.dim() < 3 or groups < 1 or x.shape[1] % groups:
        return f"x must be (N, C, ...) with C divisible by {groups} groups, got {tuple(x.shape)}"
    if weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        return f"weight and bias must be ({x.shape[1]},), got {tuple(weight.shape)} and {tuple(bias.shape)}"
    if x.shape[1] // groups > MAX_WIDTH:
        return f"the kernel takes groups of at most {MAX_WIDTH} channels, got {x.shape[1] // groups}"
    for tensor in (x, weight, bias):
        if tensor.dtype not in DTYPES:
            return f"the kernel takes float16, bfloat16, float32 and float64, got {tensor.dtype}"
    if not x.device == weight.device == bias.device:
        return f"all must be on one device, got {x.device}, {weight.device} and {bias.device}"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"the kernel needs a CUDA device, and the tensor is on {x.device.type}"
    return None


@triton.jit
def _part(R, C, S, rows, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Instance, split, its first row and the row behind its last, channels of this program."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(C, BLOCK_C)
    split = program // across % S
    c_C = (program % across * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    return program // across // S, split, split * rows, tl.minimum(R, (split + 1) * rows), c_C


@triton.jit
def _load(base, r_R, c_C, keep_RC, sr, sc, ACC: tl.constexpr):
    return tl.load(base + r_R[:, None] * sr + (c_C * sc)[None, :], mask=keep_RC, other=0.0).to(ACC)


@triton.jit
def _statistics(mean, rstd, n, c_C, C, G, W):
    """Of each channel's group: (1, C) twice."""
    at = n * G + c_C // W
    return tl.load(mean + at, mask=c_C < C, other=0.0)[None, :], tl.load(rstd + at, mask=c_C < C, other=0.0)[None, :]


@triton.jit
def _affine(weight, bias, c_C, C, ACC: tl.constexpr):
    w = tl.load(weight + c_C, mask=c_C < C, other=0.0).to(ACC)
    return w[None, :], tl.load(bias + c_C, mask=c_C < C, other=0.0).to(ACC)[None, :]


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit(do_not_specialize=["R", "S", "rows"])
def _moments_kernel(
    x, parts, R, C, S, rows, sn, sr, sc, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """x (N, R, C) by strides -> parts (N, S, 2, C): each channel's mean and sum of squared deviations from it."""
    n, split, start, end, c_C = _part(R, C, S, rows, BLOCK_R, BLOCK_C)
    base = x + n * sn
    # About the mean of the first tile: the squares then lose no more digits than there are tiles to count, wherever the
    # mean of all is (by the inequality of Cauchy and Schwarz).
    r_R = start + tl.arange(0, BLOCK_R)
    tile = _load(base, r_R, c_C, (r_R < end)[:, None] & (c_C < C)[None, :], sr, sc, ACC)
    pivot = tl.sum(tile, axis=0) / (tl.minimum(end, start + BLOCK_R) - start).to(ACC)
    plain, squares = tl.zeros((BLOCK_R, BLOCK_C), ACC), tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for first in range(start, end, BLOCK_R):
        r_R = first + tl.arange(0, BLOCK_R)
        keep_RC = (r_R < end)[:, None] & (c_C < C)[None, :]
        apart = tl.where(keep_RC, _load(base, r_R, c_C, keep_RC, sr, sc, ACC) - pivot[None, :], 0.0)
        plain += apart
        squares += apart * apart
    count = (end - start).to(ACC)
    shift = tl.sum(plain, axis=0) / count
    to = parts + (n * S + split) * 2 * C + c_C
    tl.store(to, pivot + shift, mask=c_C < C)
    tl.store(to + C, tl.sum(squares, axis=0) - shift * shift * count, mask=c_C < C)


@triton.jit(do_not_specialize=["R", "S", "rows"])
def _statistics_kernel(
    parts, mean, rstd, R, C, S, G, W, rows, EPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """parts (N, S, 2, C) -> mean, rstd (N, G), by the sum of squares within and between the parts."""
    program = tl.program_id(0).to(tl.int64)
    n, c_W = program // G, program % G * W + tl.arange(0, BLOCK_W)
    keep_W = tl.arange(0, BLOCK_W) < W
    base = parts + n * S * 2 * C
    total = tl.zeros((BLOCK_S, BLOCK_W), ACC)
    for first in range(0, S, BLOCK_S):
        s_S = first + tl.arange(0, BLOCK_S)
        keep = (s_S < S)[:, None] & keep_W[None, :]
        count = (tl.minimum(R, (s_S + 1) * rows) - s_S * rows).to(ACC)
        total += tl.load(base + s_S[:, None] * 2 * C + c_W[None, :], mask=keep, other=0.0) * count[:, None]
    size = R.to(ACC) * W
    center = tl.sum(tl.sum(total, axis=1), axis=0) / size
    squares = tl.zeros((BLOCK_S, BLOCK_W), ACC)
    for first in range(0, S, BLOCK_S):
        s_S = first + tl.arange(0, BLOCK_S)
        keep = (s_S < S)[:, None] & keep_W[None, :]
        count = (tl.minimum(R, (s_S + 1) * rows) - s_S * rows).to(ACC)
        at = base + s_S[:, None] * 2 * C + c_W[None, :]
        apart = tl.load(at, mask=keep, other=0.0) - center
        squares += tl.where(keep, tl.load(at + C, mask=keep, other=0.0) + apart * apart * count[:, None], 0.0)
    variance = tl.sum(tl.sum(squares, axis=1), axis=0) / size
    tl.store(mean + program, center)
    tl.store(rstd + program, 1.0 / tl.sqrt(variance + EPS))


@triton.jit(do_not_specialize=["R", "S", "rows"])
def _apply_kernel(
    x, weight, bias, mean, rstd, y, R, C, S, G, W, rows, sn, sr, sc,
    SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x (N, R, C) by strides -> y (N, R, C), contiguous."""
    n, split, start, end, c_C = _part(R, C, S, rows, BLOCK_R, BLOCK_C)
    mean_C, rstd_C = _statistics(mean, rstd, n, c_C, C, G, W)
    w_C, b_C = _affine(weight, bias, c_C, C, ACC)
    for first in range(start, end, BLOCK_R):
        r_R = first + tl.arange(0, BLOCK_R)
        keep_RC = (r_R < end)[:, None] & (c_C < C)[None, :]
        z = (_load(x + n * sn, r_R, c_C, keep_RC, sr, sc, ACC) - mean_C) * rstd_C * w_C + b_C
        if SILU:
            z = z * _sigmoid(z)
        tl.store(y + (n * R + r_R)[:, None] * C + c_C[None, :], z.to(y.dtype.element_ty), mask=keep_RC)


@triton.jit
def _before_silu(grad, z, SILU: tl.constexpr):
    """The gradient of what SiLU was given."""
    if SILU:
        s = _sigmoid(z)
        grad = grad * s * (1.0 + z * (1.0 - s))
    return grad


@triton.jit(do_not_specialize=["R", "S", "rows"])
def _sums_kernel(
    grad, x, weight, bias, mean, rstd, parts, R, C, S, G, W, rows, gn, gr, gc, sn, sr, sc,
    SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """parts (N, S, 2, C): each channel's sum of dz, the gradient behind the norm, and of dz times normed x."""
    n, split, start, end, c_C = _part(R, C, S, rows, BLOCK_R, BLOCK_C)
    mean_C, rstd_C = _statistics(mean, rstd, n, c_C, C, G, W)
    w_C, b_C = _affine(weight, bias, c_C, C, ACC)
    plain, weighted = tl.zeros((BLOCK_R, BLOCK_C), ACC), tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for first in range(start, end, BLOCK_R):
        r_R = first + tl.arange(0, BLOCK_R)
        keep_RC = (r_R < end)[:, None] & (c_C < C)[None, :]
        normed = (_load(x + n * sn, r_R, c_C, keep_RC, sr, sc, ACC) - mean_C) * rstd_C
        dz = _before_silu(_load(grad + n * gn, r_R, c_C, keep_RC, gr, gc, ACC), normed * w_C + b_C, SILU)
        plain += dz
        weighted += dz * normed
    to = parts + (n * S + split) * 2 * C + c_C
    tl.store(to, tl.sum(plain, axis=0), mask=c_C < C)
    tl.store(to + C, tl.sum(weighted, axis=0), mask=c_C < C)


@triton.jit(do_not_specialize=["R", "S"])
def _means_kernel(
    parts, weight, plain, weighted, R, C, S, G, W, ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """parts (N, S, 2, C) -> plain, weighted (N, G): their sums over parts, times weight, as means over a group."""
    program = tl.program_id(0).to(tl.int64)
    n, c_W = program // G, program % G * W + tl.arange(0, BLOCK_W)
    keep_W = tl.arange(0, BLOCK_W) < W
    base = parts + n * S * 2 * C
    first_sum, second_sum = tl.zeros((BLOCK_S, BLOCK_W), ACC), tl.zeros((BLOCK_S, BLOCK_W), ACC)
    for first in range(0, S, BLOCK_S):
        s_S = first + tl.arange(0, BLOCK_S)
        keep = (s_S < S)[:, None] & keep_W[None, :]
        at = base + s_S[:, None] * 2 * C + c_W[None, :]
        first_sum += tl.load(at, mask=keep, other=0.0)
        second_sum += tl.load(at + C, mask=keep, other=0.0)
    w, size = tl.load(weight + c_W, mask=keep_W, other=0.0).to(ACC), R.to(ACC) * W
    tl.store(plain + program, tl.sum(tl.sum(first_sum, axis=0) * w, axis=0) / size)
    tl.store(weighted + program, tl.sum(tl.sum(second_sum, axis=0) * w, axis=0) / size)


@triton.jit(do_not_specialize=["R", "S", "rows"])
def _backward_kernel(
    grad, x, weight, bias, mean, rstd, plain, weighted, dx, R, C, S, G, W, rows, gn, gr, gc, sn, sr, sc,
    SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx (N, R, C), contiguous; plain, weighted (N, G): means of weight * dz and of that times normed x in a group."""
    n, split, start, end, c_C = _part(R, C, S, rows, BLOCK_R, BLOCK_C)
    mean_C, rstd_C = _statistics(mean, rstd, n, c_C, C, G, W)
    w_C, b_C = _affine(weight, bias, c_C, C, ACC)
    plain_C, weighted_C = _statistics(plain, weighted, n, c_C, C, G, W)
    for first in range(start, end, BLOCK_R):
        r_R = first + tl.arange(0, BLOCK_R)
        keep_RC = (r_R < end)[:, None] & (c_C < C)[None, :]
        normed = (_load(x + n * sn, r_R, c_C, keep_RC, sr, sc, ACC) - mean_C) * rstd_C
        dz = _before_silu(_load(grad + n * gn, r_R, c_C, keep_RC, gr, gc, ACC), normed * w_C + b_C, SILU)
        d = rstd_C * (dz * w_C - plain_C - normed * weighted_C)
        tl.store(dx + (n * R + r_R)[:, None] * C + c_C[None, :], d.to(dx.dtype.element_ty), mask=keep_RC)


# Under TRITON_INTERPRET=1 the kernels run on the CPU, as numpy.
INTERPRETED = not isinstance(_apply_kernel, triton.JITFunction)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def constants(dtype: torch.dtype) -> dict[str, object]:
    """The compile-time arguments that the kernels of tiles share."""
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    return {"ACC": acc, "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "num_warps": 4}


def constants_of_groups(dtype: torch.dtype, width: int) -> dict[str, object]:
    """The same of the kernels that put the parts of groups together."""
    return {"ACC": constants(dtype)["ACC"], "BLOCK_S": BLOCK_S, "BLOCK_W": triton.next_power_of_2(width)}


def splits(shape: torch.Size | tuple[int, ...], programs: int) -> tuple[int, int]:
    """Into how many parts the rows of an instance are split, and the rows of each, for (N, R, C)."""
    N, R, C = shape
    wanted = triton.cdiv(programs, N * triton.cdiv(C, BLOCK_C))
    rows = triton.cdiv(triton.cdiv(R, min(wanted, triton.cdiv(R, BLOCK_R))), BLOCK_R) * BLOCK_R
    return triton.cdiv(R, rows), rows


def run_forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill y (N, R, C), contiguous; returns it, and the mean and 1 / standard deviation of each group, (N, G)."""
    N, R, C = x.shape
    mean, rstd = (x.new_empty(N, groups, dtype=accumulator(x.dtype)) for _ in range(2))
    if not x.numel():
        return y, mean, rstd
    (S, rows), W, across, tiles = splits(x.shape, SUMMING), C // groups, triton.cdiv(C, BLOCK_C), constants(x.dtype)
    parts = mean.new_empty(N, S, 2, C)
    with torch.cuda.device_of(x):
        _moments_kernel[(N * S * across,)](x, parts, R, C, S, rows, *x.stride(), **tiles)
        per_group = constants_of_groups(x.dtype, W)
        _statistics_kernel[(N * groups,)](parts, mean, rstd, R, C, S, groups, W, rows, EPS=eps, **per_group)
        S, rows = splits(x.shape, APPLYING)
        sizes = (R, C, S, groups, W, rows)
        _apply_kernel[(N * S * across,)](x, weight, bias, mean, rstd, y, *sizes, *x.stride(), SILU=silu, **tiles)
    return y, mean, rstd


def run_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool, dx: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill dx (N, R, C), contiguous; returns it, and the gradients of weight and bias, (C,)."""
    N, R, C = x.shape
    G, W, across, tiles = mean.shape[1], C // mean.shape[1], triton.cdiv(C, BLOCK_C), constants(x.dtype)
    if not x.numel():
        return dx, torch.zeros_like(weight), torch.zeros_like(bias)
    S, rows = splits(x.shape, SUMMING)
    parts, plain, weighted = mean.new_empty(N, S, 2, C), torch.empty_like(mean), torch.empty_like(mean)
    given, strides = (grad, x, weight, bias, mean, rstd), (*grad.stride(), *x.stride())
    with torch.cuda.device_of(x):
        _sums_kernel[(N * S * across,)](*given, parts, R, C, S, G, W, rows, *strides, SILU=silu, **tiles)
        _means_kernel[(N * G,)](parts, weight, plain, weighted, R, C, S, G, W, **constants_of_groups(x.dtype, W))
        S, rows = splits(x.shape, APPLYING)
        sizes = (R, C, S, G, W, rows)
        _backward_kernel[(N * S * across,)](*given, plain, weighted, dx, *sizes, *strides, SILU=silu, **tiles)
    dbias, dweight = (parts[:, :, which].sum((0, 1)) for which in (0, 1))
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


# Operators that torch.compile, gradient checkpointing and the like see as one


@torch.library.custom_op(
    "vdm::group_norm",
    mutates_args=(),
    schema="(Tensor x, int groups, Tensor weight, Tensor bias, float eps, bool silu) -> (Tensor, Tensor, Tensor)",
)
def _group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool):
    return run_forward(x, groups, weight.contiguous(), bias.contiguous(), eps, silu, x.new_empty(x.shape))


@torch.library.custom_op(
    "vdm::group_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, bool silu)"
    " -> (Tensor, Tensor, Tensor)",
)
def _group_norm_backward(grad, x, weight, bias, mean, rstd, silu):
    return run_backward(grad, x, weight.contiguous(), bias.contiguous(), mean, rstd, silu, x.new_empty(x.shape))


@_group_norm.register_fake
def _(x, groups, weight, bias, eps, silu):
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=accumulator(x.dtype)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@_group_norm_backward.register_fake
def _(grad, x, weight, bias, mean, rstd, silu):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx, inputs, output) -> None:
    x, _, weight, bias, _, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _differentiate(ctx, grad, _mean, _rstd):
    dx, dweight, dbias = _group_norm_backward(grad, *ctx.saved_tensors, ctx.silu)
    return dx, None, dweight, dbias, None, None


_group_norm.register_autograd(_differentiate, setup_context=_save)
