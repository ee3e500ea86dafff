"""Stochastic rounding: a neighbour, the right one on average; and the tables of 8-bit values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vdm.training import rounding
from vdm.training.rounding import BLOCK, dequantise, dynamic_code, quantise, round_to_bf16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(value=st.floats(-(2.0**100), 2.0**100, width=32), seed=st.integers(0, 2**31))
def test_a_rounded_number_is_a_neighbour(value: float, seed: int) -> None:
    rounded = round_to_bf16(torch.full((8,), value), generator(seed))
    below = torch.tensor(value).view(torch.int32) & -(1 << 16)
    allowed = {float(bits.view(torch.float32)) for bits in (below, below + (1 << 16))}
    exact = float(below.view(torch.float32)) == value
    assert {float(r) for r in rounded} <= ({value} if exact else allowed)


@pytest.mark.parametrize("value", [1.001, -3.0077, 1.5e-20, 0.2])
def test_rounding_to_bfloat16_has_the_right_mean(value: float) -> None:
    count = 200_000
    rounded = round_to_bf16(torch.full((count,), value), generator()).double()
    step = abs(value) * 2.0**-7  # no smaller than the distance of neighbours
    assert abs(rounded.mean().item() - float(torch.tensor(value))) < 4 * step / 2 / math.sqrt(count)
    assert rounded.unique().numel() == 2


def test_small_changes_arrive_which_rounding_to_nearest_loses() -> None:
    draws = generator()
    lost = kept = torch.ones(4096, dtype=torch.bfloat16)
    for _ in range(100):
        lost = (lost.float() + 1e-4).bfloat16()
        kept = round_to_bf16(kept.float() + 1e-4, draws)
    assert (lost == 1.0).all()
    assert kept.float().mean().item() == pytest.approx(1.01, abs=4e-4)


@pytest.mark.parametrize(("signed", "size"), [(True, 255), (False, 256)])
def test_the_table_is_dettmers(signed: bool, size: int) -> None:
    code = dynamic_code(signed=signed)
    assert len(code) == size and (code.diff() > 0).all()
    assert code[-1] == 1.0 and 0.0 in code.tolist() and code[0] == (-1.0 if signed else 0.0)
    if signed:
        assert torch.equal(code, -code.flip(0))
    decades = [int(((code >= 10.0**-k) & (code < 10.0 ** (1 - k))).sum()) for k in range(1, 8)]
    assert decades == ([63, 32, 16, 8, 4, 2, 1] if signed else [128, 64, 32, 16, 8, 4, 2])


@given(count=st.integers(1, 700), seed=st.integers(0, 1000), signed=st.booleans(), power=st.integers(-25, 20))
def test_there_and_back_is_a_neighbour_in_the_table(count: int, seed: int, signed: bool, power: int) -> None:
    x = torch.randn(count, generator=generator(seed)) * 10.0**power
    x = x if signed else x.abs()
    code = dynamic_code(signed=signed)
    index, scale = quantise(x, code, generator(seed))
    assert index.dtype == torch.uint8 and index.shape == (count,) and scale.shape == (-(-count // BLOCK),)
    back = dequantise(index, scale, code)
    largest = scale.repeat_interleave(BLOCK)[:count]
    assert ((back - x).abs() <= code.diff().max() * largest * 1.001).all()
    at_end = x.abs() == largest
    torch.testing.assert_close(back[at_end], x[at_end], rtol=1e-6, atol=0.0)
    assert signed or ((back > 0) == (x > 0)).all(), "what is to be divided by stays above 0"


def test_quantising_has_the_right_mean() -> None:
    x = torch.randn(BLOCK, generator=generator())
    code, draws, rounds = dynamic_code(signed=True), generator(1), 2000
    mean = sum(dequantise(*quantise(x, code, draws), code).double() for _ in range(rounds)) / rounds
    bound = code.diff().max() * x.abs().max() / 2 / math.sqrt(rounds)
    assert ((mean - x).abs() < 5 * bound).all()


def test_a_block_of_zeros_stays_so() -> None:
    for signed in (True, False):
        code = dynamic_code(signed=signed)
        assert (dequantise(*quantise(torch.zeros(300), code, generator()), code) == 0.0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_quantised_in_slices_is_a_neighbour_too(monkeypatch: pytest.MonkeyPatch, signed: bool) -> None:
    """As weights of more than four million numbers are."""
    assert rounding.SLICE % BLOCK == 0
    monkeypatch.setattr(rounding, "SLICE", 2 * BLOCK)
    count = 5 * BLOCK + 7
    x = torch.randn(count, generator=generator()) * torch.logspace(-6, 3, count)
    x, code = (x if signed else x.abs()), dynamic_code(signed=signed)
    index, scale = quantise(x, code, generator(1))
    largest = scale.repeat_interleave(BLOCK)[:count]
    assert scale.shape == (6,) and index.shape == x.shape
    assert ((dequantise(index, scale, code) - x).abs() <= code.diff().max() * largest * 1.001).all()
