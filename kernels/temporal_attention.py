"""Attention among the frames of each position, forward and backward, in the memory order of the projections around it.

Tens of thousands of sequences of 16 to 24 frames are a matter of bandwidth. So q, k and v are read where the packed
projection left them, by strides, and the results are written where the next product reads them: nothing is transposed.
A program takes a few positions of one head. Whole rows of scores fit on the chip, so the backward pass computes them
again from q and k, needs no statistics and no sums across programs, and gives the same bits every time.

Suffixes: N positions of a program, F (in a kernel: J) frames as queries (as keys), D one slice of the head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_FRAMES, MAX_HEAD_DIM = 64, 128
MAX_INT32 = 2**31 - 1
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def temporal_attention(qkv: Tensor, *, key_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T) v over frames: qkv (B, F, P, 3, H, D) of any strides -> (B, F, P, H, D), contiguous.

    Sums are in float32, in float64 for float64. `key_mask` (B, F), bool, names the frames that may be attended to; a
    clip without any has output and gradients of zero. `scale` is 1 / sqrt(D) by default. Differentiable once.
    `kernels.reference.temporal_attention` is the same in plain PyTorch. Raises ValueError as `why_not` says.
    """
    if reason := why_not(qkv):
        raise ValueError(reason)
    if key_mask is not None and (
        key_mask.shape != qkv.shape[:2] or key_mask.dtype != torch.bool or key_mask.device != qkv.device
    ):
        raise ValueError(
            f"key_mask must be bool {tuple(qkv.shape[:2])} on {qkv.device}, got {key_mask.dtype} "
            f"{tuple(key_mask.shape)} on {key_mask.device}; give one truth value a frame"
        )
    return _attention(qkv, key_mask, qkv.shape[5] ** -0.5 if scale is None else float(scale))


def why_not(qkv: Tensor) -> str | None:
    """Why the kernel cannot take a tensor, in one sentence, or None if it can."""
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        return f"qkv must be (B, F, P, 3, H, D), got {tuple(qkv.shape)}"
    if not 1 <= qkv.shape[1] <= MAX_FRAMES:
        return f"the kernel takes 1 to {MAX_FRAMES} frames, got {qkv.shape[1]}"
    if not 1 <= qkv.shape[5] <= MAX_HEAD_DIM:
        return f"the kernel takes heads of at most {MAX_HEAD_DIM} channels, got {qkv.shape[5]}"
    if qkv.dtype not in DTYPES:
        return f"the kernel takes float16, bfloat16, float32 and, interpreted, float64, got {qkv.dtype}"
    if qkv.device.type != "cuda" and not INTERPRETED:
        return f"the kernel needs a CUDA device, and the tensor is on {qkv.device.type}"
    if qkv.dtype == torch.float64 and not INTERPRETED:  # which Triton cannot compile
        return "on a GPU the kernel takes float16, bfloat16 and float32, got torch.float64"
    return None


# The kernels


@triton.jit
def _load(base, row_NF, keep_NF, d_D, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """(N, F, slice of D), zero where a row is not kept."""
    keep = keep_NF[:, :, None]
    if D % BLOCK_D != 0:
        keep = keep & (d_D < D)[None, None, :]
    x = tl.load(base + row_NF[:, :, None] + (d_D * stride_d)[None, None, :], mask=keep, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store(base, row_NF, keep_NF, d_D, x_NFD, D: tl.constexpr, BLOCK_D: tl.constexpr):
    keep = keep_NF[:, :, None]
    if D % BLOCK_D != 0:
        keep = keep & (d_D < D)[None, None, :]
    tl.store(base + row_NF[:, :, None] + d_D[None, None, :], x_NFD.to(base.dtype.element_ty), mask=keep)


@triton.jit
def _place(F, P, H, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr):
    """Clip, head, positions, frames of this program. One grid axis holds them all: the others end at 65,535."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(P, BLOCK_P)
    p_N = (program // H % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    f_F = tl.arange(0, BLOCK_F).to(tl.int64)  # times a stride it may exceed 32 bits
    return program // H // blocks, program % H, p_N, f_F


@triton.jit
def _keys(mask, b, f_F, F, stride_b, stride_f, MASKED: tl.constexpr):
    """(F,): the frames that may be attended to."""
    keep = f_F < F
    if MASKED:
        keep = keep & (tl.load(mask + b * stride_b + f_F * stride_f, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _exponentials(scores_NFJ, keys_J, SCALE: tl.constexpr):
    """exp(score - the row's largest) and their sum, 1 where the row has no key: (N, F, J), (N, F)."""
    scores = tl.where(keys_J[None, None, :], scores_NFJ * SCALE, float("-inf"))
    largest = tl.max(scores, axis=2)
    e = tl.exp(scores - tl.where(largest == float("-inf"), 0.0, largest)[:, :, None])
    total = tl.sum(e, axis=2)
    return e, tl.where(total == 0.0, 1.0, total)


@triton.jit
def _dot(a, b, ACC: tl.constexpr):
    if a.shape[0] == 1:  # products of two axes are shared among the warps; of three, whole matrices are
        a2, b2 = tl.reshape(a, a.shape[1], a.shape[2]), tl.reshape(b, b.shape[1], b.shape[2])
        product = tl.expand_dims(tl.dot(a2, b2, input_precision="ieee", out_dtype=ACC), 0)
    else:
        product = tl.dot(a, b, input_precision="ieee", out_dtype=ACC)
    return product


@triton.jit
def _t(x):
    return tl.permute(x, (0, 2, 1))


@triton.jit(do_not_specialize=["F", "P", "H"])
def _forward_kernel(
    qkv, mask, out, F, P, H, sb, sf, sp, sj, sh, sd, mask_sb, mask_sf,
    D: tl.constexpr, SCALE: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """qkv (B, F, P, 3, H, D) by strides, mask (B, F) or anything -> out (B, F, P, H, D), contiguous."""
    b, h, p_N, f_F = _place(F, P, H, BLOCK_P, BLOCK_F)
    keys_J = _keys(mask, b, f_F, F, mask_sb, mask_sf, MASKED)
    keep_NF = (p_N < P)[:, None] & (f_F < F)[None, :]
    keep_NJ = (p_N < P)[:, None] & keys_J[None, :]
    row_NF = p_N[:, None] * sp + (f_F * sf)[None, :]
    base = qkv + b * sb + h * sh

    scores = tl.zeros((BLOCK_P, BLOCK_F, BLOCK_F), ACC)
    for i in tl.static_range(0, D, BLOCK_D):
        d_D = i + tl.arange(0, BLOCK_D)
        q = _load(base, row_NF, keep_NF, d_D, sd, D, BLOCK_D, UPCAST)
        k = _load(base + sj, row_NF, keep_NJ, d_D, sd, D, BLOCK_D, UPCAST)
        scores += _dot(q, _t(k), ACC)
    e, total = _exponentials(scores, keys_J, SCALE)

    out_NF = ((b * F + f_F)[None, :] * P + p_N[:, None]) * (H * D)
    for i in tl.static_range(0, D, BLOCK_D):
        d_D = i + tl.arange(0, BLOCK_D)
        v = _load(base + 2 * sj, row_NF, keep_NJ, d_D, sd, D, BLOCK_D, UPCAST)
        o = _dot(e.to(v.dtype), v, ACC) / total[:, :, None]
        _store(out + h * D, out_NF, keep_NF, d_D, o, D, BLOCK_D)


@triton.jit(do_not_specialize=["F", "P", "H"])
def _backward_kernel(
    grad, qkv, mask, dqkv, F, P, H, gb, gf, gp, gh, gd, sb, sf, sp, sj, sh, sd, mask_sb, mask_sf,
    D: tl.constexpr, SCALE: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad (B, F, P, H, D) and qkv by strides -> dqkv (B, F, P, 3, H, D), contiguous."""
    b, h, p_N, f_F = _place(F, P, H, BLOCK_P, BLOCK_F)
    keys_J = _keys(mask, b, f_F, F, mask_sb, mask_sf, MASKED)
    keep_NF = (p_N < P)[:, None] & (f_F < F)[None, :]
    keep_NJ = (p_N < P)[:, None] & keys_J[None, :]
    row_NF = p_N[:, None] * sp + (f_F * sf)[None, :]
    grad_NF = p_N[:, None] * gp + (f_F * gf)[None, :]
    base, grad = qkv + b * sb + h * sh, grad + b * gb + h * gh

    scores = tl.zeros((BLOCK_P, BLOCK_F, BLOCK_F), ACC)
    dweights = tl.zeros((BLOCK_P, BLOCK_F, BLOCK_F), ACC)
    for i in tl.static_range(0, D, BLOCK_D):
        d_D = i + tl.arange(0, BLOCK_D)
        q = _load(base, row_NF, keep_NF, d_D, sd, D, BLOCK_D, UPCAST)
        k = _load(base + sj, row_NF, keep_NJ, d_D, sd, D, BLOCK_D, UPCAST)
        v = _load(base + 2 * sj, row_NF, keep_NJ, d_D, sd, D, BLOCK_D, UPCAST)
        do = _load(grad, grad_NF, keep_NF, d_D, gd, D, BLOCK_D, UPCAST)
        scores += _dot(q, _t(k), ACC)
        dweights += _dot(do, _t(v), ACC)
    e, total = _exponentials(scores, keys_J, SCALE)
    weights = e / total[:, :, None]
    dscores = weights * (dweights - tl.sum(weights * dweights, axis=2)[:, :, None])

    out_NF = ((b * F + f_F)[None, :] * P + p_N[:, None]) * (3 * H * D)
    dqkv += h * D
    for i in tl.static_range(0, D, BLOCK_D):
        d_D = i + tl.arange(0, BLOCK_D)
        if D > BLOCK_D:  # else the only slice is still at hand
            q = _load(base, row_NF, keep_NF, d_D, sd, D, BLOCK_D, UPCAST)
            k = _load(base + sj, row_NF, keep_NJ, d_D, sd, D, BLOCK_D, UPCAST)
            do = _load(grad, grad_NF, keep_NF, d_D, gd, D, BLOCK_D, UPCAST)
        _store(dqkv + 2 * H * D, out_NF, keep_NF, d_D, _dot(_t(weights).to(do.dtype), do, ACC), D, BLOCK_D)
        _store(dqkv, out_NF, keep_NF, d_D, _dot(dscores.to(k.dtype), k, ACC) * SCALE, D, BLOCK_D)
        _store(dqkv + H * D, out_NF, keep_NF, d_D, _dot(_t(dscores).to(q.dtype), q, ACC) * SCALE, D, BLOCK_D)


# Under TRITON_INTERPRET=1 the kernels run on the CPU, as numpy.
INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


# Launching them


def block_sizes(frames: int, head_dim: int, dtype: torch.dtype, *, backward: bool) -> dict[str, int]:
    """What a program takes at a time, and its warps: found by compiling, so that nothing spills out of registers.

    `python -m kernels.offline` shows it. Beyond 32 frames the backward pass of float32 and float64 spills.
    """
    wide = dtype in (torch.float32, torch.float64)
    block_f = max(16, triton.next_power_of_2(frames))
    block_d, warps = min(max(16, triton.next_power_of_2(head_dim)), 64), 4
    if block_f == 64:
        block_d, warps = min(block_d, 16 if wide else 32), 16 if wide and backward else 8
    elif backward and head_dim > 64:
        block_d, warps = 32, 8
    elif block_f == 32 and wide:
        warps = 8
    return {
        "BLOCK_P": max(1, (32 if wide else 64) // block_f),
        "BLOCK_F": block_f,
        "BLOCK_D": block_d,
        "num_warps": warps,
    }


def constants(qkv: Tensor, *, masked: bool, scale: float, backward: bool) -> dict[str, object]:
    """The compile-time arguments of either kernel."""
    return {
        "D": qkv.shape[5],
        "SCALE": scale,
        "MASKED": masked,
        "UPCAST": INTERPRETED and qkv.dtype in (torch.float16, torch.bfloat16),  # numpy has no products of bfloat16
        "ACC": tl.float64 if qkv.dtype == torch.float64 else tl.float32,
        **block_sizes(qkv.shape[1], qkv.shape[5], qkv.dtype, backward=backward),
    }


def _launch(kernel, before, qkv, key_mask, out, strides, scale, *, backward):
    B, F, P, _, H, D = qkv.shape
    if max(2 * qkv.stride(3), D * qkv.stride(5)) > MAX_INT32:  # what a program multiplies in 32 bits
        qkv = qkv.contiguous()
    chosen = constants(qkv, masked=key_mask is not None, scale=scale, backward=backward)
    mask, mask_strides = (qkv, (0, 0)) if key_mask is None else (key_mask.view(torch.uint8), key_mask.stride())
    programs = B * H * triton.cdiv(P, chosen["BLOCK_P"])
    if programs:
        with torch.cuda.device_of(qkv):
            kernel[(programs,)](*before, qkv, mask, out, F, P, H, *strides, *qkv.stride(), *mask_strides, **chosen)
    return out


def run_forward(qkv: Tensor, key_mask: Tensor | None, scale: float, out: Tensor) -> Tensor:
    """Fill `out` (B, F, P, H, D), contiguous, and return it."""
    return _launch(_forward_kernel, (), qkv, key_mask, out, (), scale, backward=False)


def run_backward(grad: Tensor, qkv: Tensor, key_mask: Tensor | None, scale: float, dqkv: Tensor) -> Tensor:
    """Fill `dqkv` (B, F, P, 3, H, D), contiguous, and return it."""
    if grad.shape[4] * grad.stride(4) > MAX_INT32:
        grad = grad.contiguous()
    return _launch(_backward_kernel, (grad,), qkv, key_mask, dqkv, grad.stride(), scale, backward=True)


# Operators that torch.compile, gradient checkpointing and the like see as one


@torch.library.custom_op(
    "vdm::temporal_attention", mutates_args=(), schema="(Tensor qkv, Tensor? key_mask, float scale) -> Tensor"
)
def _attention(qkv: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    return run_forward(qkv, key_mask, scale, _empty_out(qkv))


@torch.library.custom_op(
    "vdm::temporal_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor? key_mask, float scale) -> Tensor",
)
def _attention_backward(grad: Tensor, qkv: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    return run_backward(grad, qkv, key_mask, scale, qkv.new_empty(qkv.shape))


def _empty_out(qkv: Tensor) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], *qkv.shape[4:])


@_attention.register_fake
def _(qkv: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    return _empty_out(qkv)


@_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output) -> None:
    qkv, key_mask, ctx.scale = inputs
    ctx.save_for_backward(qkv, key_mask)


def _differentiate(ctx, grad: Tensor):
    return _attention_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


_attention.register_autograd(_differentiate, setup_context=_save)
