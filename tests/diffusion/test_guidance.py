"""Classifier-free guidance: its two ends, its stacking, its rescale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdm.diffusion import guided, rescale_guidance
from vdm.errors import UserError

X = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
TIMES = torch.tensor([10, 900])
COND, UNCOND = torch.randn(2, 2, 7, 6, generator=torch.Generator().manual_seed(1))


class Network:
    """A stand-in for the UNet: (B,...), (B,), (k*B,L,D) -> (k*B,...); each output depends on its own context."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.contexts: list[Tensor] = []
        self.dtype = dtype

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.contexts.append(context)
        copies = len(context) // len(x)
        x, t = x.repeat(copies, 1, 1, 1, 1), t.repeat(copies)
        text = context.mean(1)  # (kB,D)
        return ((x * text[:, 0].reshape(-1, 1, 1, 1, 1) + text[:, 1].reshape(-1, 1, 1, 1, 1)).tanh() +
                (t / 1000).reshape(-1, 1, 1, 1, 1)).to(self.dtype)  # fmt: skip


@pytest.mark.parametrize("scale, expected", [(1.0, COND), (0.0, UNCOND)])
@pytest.mark.parametrize("rescale", [0.0, 1.0])
def test_ends_of_the_scale_take_one_context(scale: float, expected: Tensor, rescale: float) -> None:
    network = Network()
    output = guided(network, COND, UNCOND, scale=scale, rescale=rescale)(X, TIMES)
    assert len(network.contexts) == 1 and torch.equal(network.contexts[0], expected)
    assert torch.equal(output, Network()(X, TIMES, expected))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_two_calls_give_what_one_gives(rescale: float) -> None:
    network = Network()
    apart = guided(network, COND, UNCOND, scale=5.0, rescale=rescale, at_once=False)(X, TIMES)
    assert [len(context) for context in network.contexts] == [2, 2]
    torch.testing.assert_close(apart, guided(Network(), COND, UNCOND, scale=5.0, rescale=rescale)(X, TIMES))


def test_scale_one_needs_no_unconditional_context() -> None:
    assert torch.equal(guided(Network(), COND, None, scale=1.0)(X, TIMES), Network()(X, TIMES, COND))
    for scale in (0.0, 9.0):
        with pytest.raises(UserError, match=f"guidance_scale {scale}"):
            guided(Network(), COND, None, scale=scale)


@settings(max_examples=40, deadline=None)
@given(st.floats(-3, 20).filter(lambda scale: scale not in (0.0, 1.0)))
def test_other_scales_extrapolate_from_one_stacked_call(scale: float) -> None:
    network = Network()
    output = guided(network, COND, UNCOND, scale=scale)(X, TIMES)
    assert len(network.contexts) == 1
    assert torch.equal(network.contexts[0], torch.cat([UNCOND, COND]))  # the unconditional half first
    uncond, cond = Network()(X, TIMES, UNCOND), Network()(X, TIMES, COND)
    torch.testing.assert_close(output, (1 - scale) * uncond + scale * cond, rtol=1e-4, atol=1e-5)


def test_full_rescale_has_the_spread_of_the_conditional_prediction() -> None:
    cond = Network()(X, TIMES, COND)
    plain = guided(Network(), COND, UNCOND, scale=9.0)(X, TIMES)
    full = guided(Network(), COND, UNCOND, scale=9.0, rescale=1.0)(X, TIMES)
    axes = (1, 2, 3, 4)
    assert (plain.std(axes) / cond.std(axes) - 1).abs().min() > 0.05  # there is something to bring back
    torch.testing.assert_close(full.std(axes), cond.std(axes))
    part = guided(Network(), COND, UNCOND, scale=9.0, rescale=0.7)(X, TIMES)
    torch.testing.assert_close(part, 0.7 * full + 0.3 * plain)  # Lin et al. 2024, eq. 16


def test_rescale_treats_each_clip_alone() -> None:
    output, cond = 3 * X, torch.stack([X[0], 5 * X[1]])
    both = rescale_guidance(output, cond, rescale=0.6)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], rescale_guidance(output[i : i + 1], cond[i : i + 1], rescale=0.6))
    assert torch.equal(rescale_guidance(output, cond, rescale=0.0), output)


def test_rescale_of_a_constant_prediction_is_finite() -> None:
    flat = torch.full_like(X, 0.3)
    assert rescale_guidance(flat, flat, rescale=1.0).isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 9.0])
def test_low_precision_network_gives_float32(scale: Any) -> None:
    assert guided(Network(torch.bfloat16), COND, UNCOND, scale=scale)(X, TIMES).dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([0.0, 1.0, 5.0]), st.sampled_from([0.0, 0.7]), st.floats(0.1, 4.0))
def test_what_a_perturbed_network_lacks_is_added(scale: float, rescale: float, pag_scale: float) -> None:
    worse, used = Network(), Network()

    def blurred(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        used.contexts.append(context)
        return 0.5 * worse(x, t, context)

    chosen: dict[str, Any] = {"scale": scale, "rescale": rescale, "perturbed": blurred, "pag_scale": pag_scale}
    output = guided(Network(), COND, UNCOND, **chosen)(X, TIMES)
    own = UNCOND if scale == 0 else COND
    uncond, cond = Network()(X, TIMES, UNCOND), Network()(X, TIMES, own)
    wanted = cond if scale in (0.0, 1.0) else uncond + scale * (cond - uncond)
    wanted = wanted + pag_scale * (cond - 0.5 * cond)
    if rescale:
        wanted = rescale_guidance(wanted, cond, rescale=rescale)
    torch.testing.assert_close(output, wanted)
    assert len(used.contexts) == 1 and torch.equal(used.contexts[0], own), "one more call, with one text"


def test_without_a_scale_no_perturbed_network_is_asked() -> None:
    def never(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        raise AssertionError

    plain = guided(Network(), COND, UNCOND, scale=5.0)(X, TIMES)
    assert torch.equal(guided(Network(), COND, UNCOND, scale=5.0, perturbed=never)(X, TIMES), plain)
