"""The GroupNorm kernel against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numbers_of_kernels import DEVICE, error, randn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import group_norm as module
from kernels import reference
from kernels.group_norm import group_norm, run_backward, run_forward, splits


def affine(channels: int) -> tuple[Tensor, Tensor]:
    return 1.0 + 0.5 * randn(channels, seed=2), randn(channels, seed=3)


def channels_last(N: int, C: int, *space: int) -> Tensor:
    return randn(N, *space, C).movedim(-1, 1)


def errors(x: Tensor, groups: int, silu: bool, eps: float = 1e-5) -> list[float]:
    """Of the output and all gradients, against the reference in float64 on the same numbers."""
    given = [t.to(x.dtype) for t in affine(x.shape[1])]
    ours = [t.detach().requires_grad_() for t in (x, *given)]
    exact = [t.detach().double().requires_grad_() for t in (x, *given)]
    out = group_norm(ours[0], groups, ours[1], ours[2], eps, silu)
    expected = reference.group_norm(exact[0], groups, exact[1], exact[2], eps, silu)
    assert out.dtype == x.dtype and out.shape == x.shape and out.movedim(1, -1).is_contiguous()
    grad = randn(*x.shape, seed=1).to(x.dtype)
    out.backward(grad)
    expected.backward(grad.double())
    return [error(out, expected), *(error(a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]


@pytest.mark.parametrize("silu", [False, True])
def test_the_reference_is_pytorchs(silu: bool) -> None:
    x, (weight, bias) = randn(2, 6, 3, 4), affine(6)
    expected = F.group_norm(x, 3, weight, bias, 1e-3)
    torch.testing.assert_close(
        reference.group_norm(x, 3, weight, bias, 1e-3, silu), F.silu(expected) if silu else expected
    )


@settings(max_examples=10)
@given(
    st.integers(1, 2),
    st.sampled_from([(2, 2), (2, 6), (1, 20), (32, 64), (3, 90)]),
    st.sampled_from([(1, 3), (5, 7), (33,), (2, 3, 4)]),
    st.sampled_from(["channels last", "channels first", "every other", "shared"]),
    st.booleans(),
)
def test_forward_and_backward_in_float32(
    N: int, sizes: tuple[int, int], space: tuple[int, ...], layout: str, silu: bool
) -> None:
    groups, C = sizes
    x = channels_last(N, C, *space).float()
    if layout == "channels first":
        x = x.contiguous()
    elif layout == "every other":
        x = channels_last(N, 2 * C, *space).float()[:, ::2]
    elif layout == "shared":  # by all instances
        x = x[:1].expand_as(x)
    found = errors(x, groups, silu)
    assert max(found) < 1e-5, found


@pytest.mark.slow
@settings(max_examples=25)
@given(
    st.integers(1, 3), st.integers(1, 8), st.integers(1, 40), st.integers(1, 100), st.booleans(),
    st.sampled_from([1e-6, 1e-5, 0.1]),
)  # fmt: skip
def test_any_shape(N: int, groups: int, width: int, rows: int, silu: bool, eps: float) -> None:
    if width * rows > 1:  # one number alone is its own mean: what is left is rounding
        found = errors(channels_last(N, groups * width, rows).float(), groups, silu, eps)
        assert max(found) < 2e-5, found


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_other_types(dtype: torch.dtype, tolerance: float) -> None:
    found = errors(channels_last(2, 12, 5, 8).to(dtype), 4, True)
    assert max(found) < tolerance, found


def test_parameters_of_another_type_than_the_numbers(rows: int = 9) -> None:
    x, parameters = channels_last(1, 6, rows).bfloat16(), [p.float().requires_grad_() for p in affine(6)]
    out = group_norm(x, 2, parameters[0], parameters[1], 1e-5, True)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)


@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_mean_far_from_zero_costs_no_more_than_its_own_digits(mean: float) -> None:
    x = (channels_last(1, 8, 100) + mean).float()
    weight, bias = (p.float() for p in affine(8))
    out = group_norm(x, 2, weight, bias, 1e-5, False)
    assert error(out, reference.group_norm(x.double(), 2, weight.double(), bias.double(), 1e-5, False)) < 1e-6 * abs(
        mean
    )


def test_one_row_far_from_all_others_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SUMMING", 1)  # so that one program takes all rows
    x = channels_last(1, 8, 300)
    x[..., 0] = 300.0
    assert max(errors(x.float(), 2, False)) < 1e-5


def test_numbers_that_are_all_equal() -> None:
    x = torch.full((1, 4, 9), 7.0, device=DEVICE)
    weight, bias = (p.float() for p in affine(4))
    out = group_norm(x, 2, weight, bias, 1e-5, False)
    torch.testing.assert_close(out, bias[None, :, None].expand_as(out))


@pytest.mark.parametrize("shape", [(1, 1, 320), (64, 1024, 320), (1, 65_536, 320), (4, 16_384, 2560), (700, 5, 32)])
def test_rows_are_split_among_enough_programs_and_none_is_left_out(shape: tuple[int, int, int]) -> None:
    count, rows = splits(shape, module.SUMMING)
    assert (count - 1) * rows < shape[1] <= count * rows
    programs = count * shape[0] * -(-shape[2] // module.BLOCK_C)
    assert programs >= min(module.SUMMING // 2, shape[0] * -(-shape[1] // module.BLOCK_R))


def test_gradcheck() -> None:
    given = [t.requires_grad_() for t in (channels_last(1, 4, 2), *affine(4))]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, 2, w, b, 1e-3, True), given)


@pytest.mark.slow
def test_opcheck() -> None:
    x, (weight, bias) = randn(2, 5, 6).float(), (p.float().requires_grad_() for p in affine(6))
    torch.library.opcheck(torch.ops.vdm.group_norm.default, (x.requires_grad_(), 3, weight, bias, 1e-5, True))
    mean, rstd = randn(2, 3).float(), randn(2, 3).float().abs()
    given = (randn(2, 5, 6).float(), x.detach(), weight.detach(), bias.detach(), mean, rstd, True)
    torch.library.opcheck(torch.ops.vdm.group_norm_backward.default, given)


def test_every_number_is_written_and_two_runs_are_equal_to_the_bit() -> None:
    x, grad, (weight, bias) = randn(2, 70, 72).float(), randn(2, 70, 72).float(), (p.float() for p in affine(72))
    runs = [run_forward(x, 3, weight, bias, 1e-5, True, torch.full_like(x, float("nan"))) for _ in range(2)]
    mean, rstd = runs[0][1:]
    backs = [run_backward(grad, x, weight, bias, mean, rstd, True, torch.full_like(x, float("nan"))) for _ in range(2)]
    for first, second in (*zip(*runs, strict=True), *zip(*backs, strict=True)):
        assert first.isfinite().all() and torch.equal(first, second)


def test_computed_again_under_activation_checkpointing() -> None:
    x, (weight, bias) = randn(1, 4, 6).float().requires_grad_(), (p.float() for p in affine(4))
    norm = lambda x: group_norm(x, 2, weight, bias, 1e-5, True)  # noqa: E731
    calls = (norm, lambda x: checkpoint(norm, x, use_reentrant=False))
    assert torch.equal(*(torch.autograd.grad(call(2.0 * x).square().sum(), x)[0] for call in calls))


def test_no_instances() -> None:
    x, (weight, bias) = torch.zeros(0, 4, 3, device=DEVICE).requires_grad_(), (p.float() for p in affine(4))
    out = group_norm(x, 2, weight, bias, 1e-5, True)
    out.sum().backward()
    assert out.shape == (0, 4, 3)


def test_what_it_refuses() -> None:
    x, w = torch.zeros(1, 6, 2, device=DEVICE), torch.zeros(6, device=DEVICE)
    for arguments, said in (
        ((x, 4, w, w), "divisible by 4 groups"),
        ((x[..., 0], 2, w, w), "x must be"),
        ((x, 2, w[:3], w), "weight and bias must be"),
        ((x.long(), 2, w, w), "got torch.int64"),
        ((x, 2, w.long(), w), "got torch.int64"),
        ((x, 2, w.to("meta"), w), "on one device"),
        ((torch.zeros(1, 257, 2, device=DEVICE), 1, *[torch.zeros(257, device=DEVICE)] * 2), "at most 256 channels"),
    ):
        with pytest.raises(ValueError, match=said):
            group_norm(*arguments, 1e-5, True)
