"""The kernel of residual sum and LayerNorm against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numbers_of_kernels import DEVICE, error, randn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import add_layer_norm as module
from kernels import reference
from kernels.add_layer_norm import add_layer_norm, run_backward, run_forward


def affine(channels: int) -> tuple[Tensor, Tensor]:
    return 1.0 + 0.5 * randn(channels, seed=2), randn(channels, seed=3)


def errors(x: Tensor, branch: Tensor) -> list[float]:
    """Of both outputs and all gradients, against the reference in float64 on the same numbers."""
    given = [t.to(x.dtype) for t in affine(x.shape[-1])]
    ours = [t.detach().requires_grad_() for t in (x, branch, *given)]
    exact = [t.detach().double().requires_grad_() for t in (x, branch, *given)]
    outs = add_layer_norm(*ours, 1e-5)  # type: ignore[misc]
    expected = reference.add_layer_norm(*exact, 1e-5)  # type: ignore[misc]
    assert all(out.dtype == x.dtype and out.shape == x.shape and out.is_contiguous() for out in outs)
    grads = [randn(*x.shape, seed=seed).to(x.dtype) for seed in (4, 5)]
    torch.autograd.backward(outs, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    pairs = [*zip(outs, expected, strict=True), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    return [error(a, b) for a, b in pairs]  # type: ignore[arg-type]


def test_the_reference_is_pytorchs() -> None:
    x, branch, (weight, bias) = randn(3, 4, 6), randn(3, 4, 6, seed=1), affine(6)
    total, normed = reference.add_layer_norm(x, branch, weight, bias, 1e-3)
    torch.testing.assert_close(total, x + branch)
    torch.testing.assert_close(normed, F.layer_norm(x + branch, (6,), weight, bias, 1e-3))


@settings(max_examples=10)
@given(
    st.lists(st.integers(1, 5), max_size=3),
    st.sampled_from([2, 3, 16, 320, 1280]),
    st.sampled_from(["packed", "transposed", "every other", "shared"]),
)
def test_forward_and_backward_in_float32(leading: list[int], channels: int, layout: str) -> None:
    x, branch = randn(*leading, channels).float(), randn(*leading, channels, seed=1).float()
    if layout == "transposed":
        x = randn(channels, *leading).float().movedim(0, -1)
    elif layout == "every other":
        branch = randn(*leading, 2 * channels).float()[..., ::2]
    elif layout == "shared":
        x = randn(channels).float().expand(*leading, -1)
    found = errors(x, branch)
    assert max(found) < 1e-5, found


@pytest.mark.slow
@settings(max_examples=25)
@given(st.integers(1, 300), st.integers(2, 200))
def test_any_shape(rows: int, channels: int) -> None:
    found = errors(randn(rows, channels).float(), randn(rows, channels, seed=1).float())
    assert max(found) < 2e-5, found


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_other_types(dtype: torch.dtype, tolerance: float) -> None:
    found = errors(randn(5, 40).to(dtype), randn(5, 40, seed=1).to(dtype))
    assert max(found) < tolerance, found


def test_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRAMS", 2)  # so that each takes several tiles
    monkeypatch.setattr(module, "TILE", 16)
    assert max(errors(randn(37, 6).float(), randn(37, 6, seed=1).float())) < 1e-5


def test_parameters_of_another_type_than_the_numbers() -> None:
    x, (weight, bias) = randn(3, 6).bfloat16(), (p.float().requires_grad_() for p in affine(6))
    total, normed = add_layer_norm(x, x, weight, bias.to(torch.float16), 1e-5)
    (total + normed).sum().backward()
    assert total.dtype == normed.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.float32 == bias.grad.dtype  # type: ignore[union-attr]


def test_gradcheck() -> None:
    given = [t.requires_grad_() for t in (randn(3, 4), randn(3, 4, seed=1), *affine(4))]
    assert torch.autograd.gradcheck(lambda *x: add_layer_norm(*x, 1e-3), given)


@pytest.mark.slow
def test_opcheck() -> None:
    x, branch, (weight, bias) = randn(2, 3, 6).float(), randn(2, 3, 6).float(), (p.float() for p in affine(6))
    given = [t.requires_grad_() for t in (x, branch, weight, bias)]
    torch.library.opcheck(torch.ops.vdm.add_layer_norm.default, (*given, 1e-5))
    mean, rstd = randn(6).float(), randn(6).float().abs()
    plain = [t.detach() for t in (x, branch, x, weight)]
    torch.library.opcheck(torch.ops.vdm.add_layer_norm_backward.default, (*plain, mean, rstd))


def test_every_number_is_written_and_two_runs_are_equal_to_the_bit() -> None:
    x, branch, dy = (randn(37, 300, seed=seed).float() for seed in (0, 1, 4))
    weight, bias = (p.float() for p in affine(300))
    nan = lambda: torch.full_like(x, float("nan"))  # noqa: E731
    runs = [run_forward(x, branch, weight, bias, 1e-5, nan(), nan()) for _ in range(2)]
    total, _, mean, rstd = runs[0]
    backs = [run_backward(x, dy, total, weight, mean, rstd, nan()) for _ in range(2)]
    for first, second in (*zip(*runs, strict=True), *zip(*backs, strict=True)):
        assert first.isfinite().all() and torch.equal(first, second)


def test_computed_again_under_activation_checkpointing() -> None:
    x, (weight, bias) = randn(5, 8).float().requires_grad_(), (p.float() for p in affine(8))
    norm = lambda x: torch.cat(add_layer_norm(x, x.sin(), weight, bias, 1e-5))  # noqa: E731
    calls = (norm, lambda x: checkpoint(norm, x, use_reentrant=False))
    assert torch.equal(*(torch.autograd.grad(call(2.0 * x).square().sum(), x)[0] for call in calls))


def test_no_rows() -> None:
    x, (weight, bias) = torch.zeros(0, 6, device=DEVICE).requires_grad_(), (p.float() for p in affine(6))
    outs = add_layer_norm(x, x, weight, bias, 1e-5)
    sum(outs).sum().backward()  # type: ignore[union-attr]
    assert [out.shape for out in outs] == [(0, 6), (0, 6)]


def test_what_it_refuses() -> None:
    x, w = torch.zeros(2, 6, device=DEVICE), torch.zeros(6, device=DEVICE)
    big = torch.zeros(1, 4097, device=DEVICE)
    for arguments, said in (
        ((x, x[:1], w, w), "of one shape and type"),
        ((x, x.half(), w, w), "of one shape and type"),
        ((x, x, w[:3], w), "weight and bias must be"),
        ((big, big, big[0], big[0]), "1 to 4096 channels, got 4097"),
        ((x.long(), x.long(), w, w), "got torch.int64"),
        ((x, x, w.to("meta"), w), "on one device"),
    ):
        with pytest.raises(ValueError, match=said):
            add_layer_norm(*arguments, 1e-5)
