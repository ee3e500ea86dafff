"""The GEGLU kernel against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbers_of_kernels import DEVICE, error, randn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import reference
from kernels.geglu import geglu, run_backward, run_forward


def errors(x: Tensor) -> list[float]:
    """Of the output and the gradient, against the reference in float64 on the same numbers."""
    dtype, ours = x.dtype, x.detach().requires_grad_()
    exact = ours.detach().double().requires_grad_()
    out, expected = geglu(ours), reference.geglu(exact)
    grad = randn(*expected.shape, seed=1).to(dtype)
    assert out.dtype == dtype and out.shape == expected.shape and out.is_contiguous()
    out.backward(grad)
    expected.backward(grad.double())
    assert ours.grad is not None and exact.grad is not None
    return [error(out, expected), error(ours.grad, exact.grad)]


def test_the_reference_is_a_product_with_the_normal_distribution() -> None:
    x = randn(3, 10)
    normal = 0.5 * (1 + torch.erf(x[:, 5:] / 2**0.5))
    torch.testing.assert_close(reference.geglu(x), x[:, :5] * x[:, 5:] * normal)


@settings(max_examples=10)
@given(
    st.lists(st.integers(1, 5), max_size=3),
    st.sampled_from([1, 3, 16, 255, 257, 320]),
    st.sampled_from(["packed", "transposed", "every other", "shared"]),
)
def test_forward_and_backward_in_float32(leading: list[int], width: int, layout: str) -> None:
    x = 3.0 * randn(*leading, 2 * width).float()
    if layout == "transposed":
        x = randn(2 * width, *leading).float().movedim(0, -1)
    elif layout == "every other":
        x = randn(*leading, 4 * width).float()[..., ::2]
    elif layout == "shared":
        x = randn(2 * width).float().expand(*leading, -1)
    found = errors(x)
    assert max(found) < 1e-5, found


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_other_types(dtype: torch.dtype, tolerance: float) -> None:
    assert max(errors(randn(5, 2 * 40).to(dtype))) < tolerance


def test_far_from_zero_it_is_linear_or_nothing() -> None:
    x = torch.tensor([[2.0, 3.0, 40.0, -40.0]], device=DEVICE).requires_grad_()
    out = geglu(x)
    out.sum().backward()
    assert out.tolist() == [[80.0, 0.0]]
    assert x.grad is not None and x.grad.tolist() == [[40.0, 0.0, 2.0, 0.0]]


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(geglu, (randn(2, 4).requires_grad_(),))


@pytest.mark.slow
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.vdm.geglu.default, (randn(2, 3, 6).float().requires_grad_(),))
    torch.library.opcheck(torch.ops.vdm.geglu_backward.default, (randn(2, 3).float(), randn(2, 6).float()))


def test_every_number_is_written_and_two_runs_are_equal_to_the_bit() -> None:
    x, grad = randn(37, 2 * 300).float(), randn(37, 300).float()
    outs = [run_forward(x, torch.full_like(grad, float("nan"))) for _ in range(2)]
    grads = [run_backward(grad, x, torch.full_like(x, float("nan"))) for _ in range(2)]
    for pair in (outs, grads):
        assert pair[0].isfinite().all() and torch.equal(*pair)


def test_computed_again_under_activation_checkpointing() -> None:
    x = randn(5, 8).float().requires_grad_()
    calls = (geglu, lambda x: checkpoint(geglu, x, use_reentrant=False))
    assert torch.equal(*(torch.autograd.grad(call(2.0 * x).square().sum(), x)[0] for call in calls))


def test_no_rows() -> None:
    assert geglu(torch.zeros(0, 6, device=DEVICE)).shape == (0, 3)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="x must be"):
        geglu(torch.zeros(2, 3, device=DEVICE))
    with pytest.raises(ValueError, match="got torch.int64"):
        geglu(torch.zeros(2, 4, dtype=torch.int64, device=DEVICE))
