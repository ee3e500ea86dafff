"""The temporal attention kernel against float64, at every shape, stride, mask and length that it takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numbers_of_kernels import DEVICE, error, randn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import reference
from kernels import temporal_attention as module
from kernels.temporal_attention import run_backward, run_forward, temporal_attention

LENGTHS = [1, 2, 7, 16, 17, 24, 33, 64]
LAYOUTS = ["packed", "reordered", "every other", "shared"]


def packed(
    B: int, F: int, P: int, H: int, D: int, *, layout: str = "packed", dtype: torch.dtype = torch.float64
) -> Tensor:
    """Random qkv (B, F, P, 3, H, D), laid out in one of LAYOUTS."""
    if layout == "reordered":  # heads outside, frames next to channels
        return randn(B, 3, H, P, D, F).to(dtype).permute(0, 5, 3, 1, 2, 4)
    if layout == "every other":
        return randn(B, 2 * F, P, 3, H, 2 * D).to(dtype)[:, ::2, ..., ::2]
    if layout == "shared":  # all positions are one in memory
        return randn(B, F, 1, 3, H, D).to(dtype).expand(-1, -1, P, -1, -1, -1)
    return randn(B, F, P, 3, H, D).to(dtype)


def random_mask(B: int, F: int) -> Tensor:
    """Of each clip some frames, and of the last clip none."""
    mask = torch.rand(B, F, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[-1] = False
    return mask.to(DEVICE)


def errors(qkv: Tensor, *, key_mask: Tensor | None = None, scale: float | None = None) -> list[float]:
    """Of the output and the gradient, against the reference in float64 on the same numbers."""
    dtype, ours = qkv.dtype, qkv.detach().requires_grad_()
    exact = ours.detach().double().requires_grad_()
    grad = randn(*qkv.shape[:3], *qkv.shape[4:], seed=1).to(dtype)
    out = temporal_attention(ours, key_mask=key_mask, scale=scale)
    expected = reference.temporal_attention(exact, key_mask=key_mask, scale=scale)
    assert out.dtype == dtype and out.shape == expected.shape and out.is_contiguous()
    out.backward(grad)
    expected.backward(grad.double())
    assert ours.grad is not None and exact.grad is not None
    # One frame attends to itself alone: what is left of dq and dk is rounding, so they are measured by all of qkv's.
    return [error(out, expected), error(ours.grad, exact.grad)]


# The oracle


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_is_attention_of_each_position_alone(layout: str) -> None:
    qkv, mask = packed(2, 5, 3, 2, 4, layout=layout), random_mask(2, 5)
    plain, masked = reference.temporal_attention(qkv), reference.temporal_attention(qkv, key_mask=mask, scale=0.3)
    for p in range(3):
        q, k, v = qkv[:, :, p].permute(2, 0, 3, 1, 4)  # (B, H, F, D)
        expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        torch.testing.assert_close(plain[:, :, p], expected)
        q, k, v = q[:1], k[:1][..., mask[0], :], v[:1][..., mask[0], :]
        torch.testing.assert_close(masked[:1, :, p], F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2))
    assert not masked[1].any(), "a clip without any frame to attend to"


def test_the_reference_has_gradients_where_a_clip_has_no_key() -> None:
    qkv = packed(2, 3, 1, 1, 2).requires_grad_()
    mask = random_mask(2, 3)
    assert torch.autograd.gradcheck(lambda x: reference.temporal_attention(x, key_mask=mask), (qkv,))


# The kernel


@pytest.mark.parametrize("frames", [1, 7, 17, 24, 33])
@settings(max_examples=2)
@given(
    st.sampled_from([(2, 3, 1), (2, 1, 1), (1, 2, 2)]),
    st.sampled_from([16, 40, 64]),
    st.sampled_from(LAYOUTS),
    st.booleans(),
)
def test_forward_and_backward_in_float32(
    frames: int, sizes: tuple[int, int, int], D: int, layout: str, masked: bool
) -> None:
    B, P, H = sizes
    key_mask = random_mask(B, frames) if masked and B > 1 else None
    found = errors(packed(B, frames, P, H, D, layout=layout, dtype=torch.float32), key_mask=key_mask)
    assert max(found) < 1e-5, found


@pytest.mark.slow
@settings(max_examples=12)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 64), st.integers(1, 5), st.integers(1, 2)),
    st.integers(1, 128),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.sampled_from([None, 0.05, 1.0]),
)
def test_any_shape_and_layout(
    shape: tuple[int, int, int, int], D: int, layout: str, masked: bool, scale: float | None
) -> None:
    qkv = packed(*shape, D, layout=layout, dtype=torch.float32)
    found = errors(qkv, key_mask=random_mask(*shape[:2]) if masked else None, scale=scale)
    assert max(found) < 1e-5, found


@pytest.mark.slow
@pytest.mark.parametrize("frames", range(1, 65))
def test_every_length(frames: int) -> None:
    key_mask = torch.arange(frames, device=DEVICE)[None] % 3 < 2
    found = errors(packed(1, frames, 2, 1, 16, dtype=torch.float32), key_mask=key_mask)
    assert max(found) < 1e-5, found


@pytest.mark.skipif(DEVICE == "cuda", reason="Triton 3.6 cannot compile products of float64 matrices for a GPU")
@pytest.mark.parametrize("frames", [7, 24])
def test_float64_is_exact(frames: int) -> None:
    assert max(errors(packed(2, frames, 2, 1, 24), key_mask=random_mask(2, frames))) < 1e-12


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("frames", [16, 24])
def test_half_precision(dtype: torch.dtype, tolerance: float, frames: int) -> None:
    assert max(errors(packed(1, frames, 3, 1, 64, dtype=dtype))) < tolerance


@pytest.mark.skipif(DEVICE == "cuda", reason="Triton 3.6 cannot compile products of float64 matrices for a GPU")
def test_gradcheck() -> None:
    mask = torch.tensor([[True, False, True]], device=DEVICE)
    call = lambda x: temporal_attention(x, key_mask=mask, scale=0.7)  # noqa: E731
    assert torch.autograd.gradcheck(call, (packed(1, 3, 1, 1, 2).requires_grad_(),))


def test_opcheck(layout: str = "reordered") -> None:
    qkv = packed(2, 7, 1, 1, 16, layout=layout, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.vdm.temporal_attention.default, (qkv, random_mask(2, 7), 0.25))


@pytest.mark.slow
def test_opcheck_of_the_backward_pass() -> None:
    qkv, grad = packed(2, 7, 3, 1, 16).float(), randn(2, 7, 3, 1, 16).float()
    torch.library.opcheck(torch.ops.vdm.temporal_attention_backward.default, (grad, qkv.detach(), None, 0.25))


@pytest.mark.parametrize("frames, positions, head_dim", [(1, 5, 16), (17, 3, 40)])
def test_every_number_is_written(frames: int, positions: int, head_dim: int) -> None:
    qkv, grad = packed(2, frames, positions, 1, head_dim).float(), randn(2, frames, positions, 1, head_dim).float()
    mask = random_mask(2, frames)
    out, dqkv = torch.full_like(grad, float("nan")), torch.full_like(qkv, float("nan"))
    assert run_forward(qkv, mask, 0.1, out).isfinite().all()
    assert run_backward(grad, qkv, mask, 0.1, dqkv).isfinite().all()


def test_two_runs_are_equal_to_the_bit() -> None:
    qkv, grad = packed(1, 24, 3, 1, 64).float(), randn(1, 24, 3, 1, 64).float()
    for run, like in ((lambda out: run_forward(qkv, None, 0.1, out), grad),
                      (lambda out: run_backward(grad, qkv, None, 0.1, out), qkv)):  # fmt: skip
        assert torch.equal(run(torch.empty_like(like)), run(torch.empty_like(like)))


def test_what_a_masked_frame_holds_counts_for_nothing() -> None:
    qkv = packed(1, 7, 2, 1, 16).float()
    mask = torch.tensor([[True, True, False, True, False, True, True]], device=DEVICE)
    dirty = qkv.clone()
    dirty[:, ~mask[0], :, 1:] = float("nan")
    dirty.requires_grad_()
    out = temporal_attention(dirty, key_mask=mask)
    assert torch.equal(out, temporal_attention(qkv, key_mask=mask))
    out.sum().backward()
    assert dirty.grad is not None and not dirty.grad[:, ~mask[0], :, 1:].any() and dirty.grad.isfinite().all()


def test_a_gradient_of_any_strides(frames: int = 7) -> None:
    qkv = packed(2, frames, 3, 2, 16).requires_grad_()
    reordered = randn(2, 2, 16, 3, frames).permute(0, 4, 3, 1, 2)
    for grad in (reordered, randn(1, 1, 1, 1, 1).expand(2, frames, 3, 2, 16)):
        ours, theirs = (
            torch.autograd.grad(f(qkv), qkv, grad)[0] for f in (temporal_attention, reference.temporal_attention)
        )
        assert error(ours, theirs) < 1e-12


@pytest.mark.slow
def test_more_positions_than_a_grid_axis_but_the_first_has(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":  # few programs, for the interpreter takes milliseconds for each
        blocks = {"BLOCK_P": 4096, "BLOCK_F": 16, "BLOCK_D": 16, "num_warps": 4}
        monkeypatch.setattr(module, "block_sizes", lambda *args, **options: blocks)
    assert max(errors(packed(1, 2, 66_000, 1, 4, dtype=torch.float32))) < 1e-5


@pytest.mark.slow
def test_strides_beyond_32_bits() -> None:
    """Two frames 2**32 bytes apart, in memory that is never touched between them."""
    memory = torch.empty(2**31 + 4096, dtype=torch.float16, device=DEVICE)
    qkv = memory.as_strided((1, 2, 1, 3, 1, 16), (0, 2**31, 48, 16, 16, 1))
    qkv.copy_(packed(1, 2, 1, 1, 16))
    assert error(temporal_attention(qkv), reference.temporal_attention(qkv.clone())) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("axis", [3, 5])
def test_strides_beyond_32_bits_within_a_head(axis: int) -> None:
    """Queries, keys and values, or channels, so far apart that their places do not fit into 32 bits."""
    shape, strides = (1, 2, 1, 3, 1, 16), [0, 16, 0, 32, 0, 1]
    strides[axis] = 2**30 if axis == 3 else 2**27
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    qkv = torch.empty(size, dtype=torch.float16, device=DEVICE).as_strided(shape, strides)
    qkv.copy_(packed(1, 2, 1, 1, 16))
    assert error(temporal_attention(qkv), reference.temporal_attention(qkv.clone())) < 1e-3


def test_computed_again_under_activation_checkpointing() -> None:
    qkv = packed(1, 7, 2, 1, 16).float().requires_grad_()
    grads = []
    for call in (temporal_attention, lambda x: checkpoint(temporal_attention, x, use_reentrant=False)):
        out = call(2.0 * qkv) + call(qkv)
        grads.append(torch.autograd.grad(out.square().sum(), qkv)[0])
    assert torch.equal(*grads)


@pytest.mark.slow
def test_compiled_without_a_break_in_the_graph() -> None:
    qkv = packed(1, 7, 2, 1, 16).float().requires_grad_()
    compiled = torch.compile(lambda x: temporal_attention(x * 2.0).sin(), backend="aot_eager", fullgraph=True)
    plain = temporal_attention(qkv * 2.0).sin()
    torch.testing.assert_close(compiled(qkv), plain)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), qkv)[0] for x in (compiled(qkv), plain)))


def test_no_clips_and_no_positions() -> None:
    for shape in [(0, 3, 2, 1, 16), (2, 3, 0, 1, 16)]:
        qkv = packed(*shape).requires_grad_()
        out = temporal_attention(qkv)
        out.sum().backward()
        assert out.shape == (*shape[:3], *shape[3:]) and qkv.grad is not None


@pytest.mark.parametrize(
    "shape, said",
    [
        ((2, 3, 4, 2, 1, 16), "qkv must be"),
        ((2, 3, 4, 3, 16), "qkv must be"),
        ((1, 65, 1, 3, 1, 16), "1 to 64 frames, got 65"),
        ((1, 0, 1, 3, 1, 16), "1 to 64 frames, got 0"),
        ((1, 2, 1, 3, 1, 136), "at most 128 channels, got 136"),
    ],
)
def test_shapes_that_it_refuses(shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        temporal_attention(torch.zeros(shape, device=DEVICE))


def test_types_and_masks_that_it_refuses() -> None:
    with pytest.raises(ValueError, match="got torch.int64"):
        temporal_attention(torch.zeros(1, 2, 1, 3, 1, 16, dtype=torch.int64, device=DEVICE))
    for mask in (torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 2)):
        with pytest.raises(ValueError, match="key_mask must be bool"):
            temporal_attention(torch.zeros(1, 2, 1, 3, 1, 16, device=DEVICE), key_mask=mask.to(DEVICE))
    with pytest.raises(ValueError, match="on meta"):
        mask = torch.ones(1, 2, dtype=torch.bool, device="meta")
        temporal_attention(torch.zeros(1, 2, 1, 3, 1, 16, device=DEVICE), key_mask=mask)
