"""AdamW in little memory, against AdamW in float64; how much memory; and that what is kept goes on bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vdm.training.adam import SMALL, AdamW, States
from vdm.training.optim import build_optimizer
from vdm.training.settings import TrainingConfig

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SIZE = SMALL + 300  # more than a whole number of blocks


def noisy_gradient(weight: Tensor, step: int) -> Tensor:
    """Of the squared distance to a fixed point, with noise, at scales from 1e-4 to 1."""
    draws = torch.Generator().manual_seed(step)
    scale = torch.logspace(-4, 0, SIZE, dtype=torch.float64)
    target = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    noise = torch.randn(SIZE, generator=draws, dtype=torch.float64)
    return scale * (weight.double() - target + 0.5 * noise)


def run(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: range) -> None:
    for step in steps:
        p.grad = noisy_gradient(p.detach(), step).to(p.dtype)
        optimizer.step()


def start(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(SIZE, dtype=dtype))


def oracle(steps: int) -> Tensor:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    weight = torch.zeros(SIZE, dtype=torch.float64)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    (beta1, beta2), rate = SETTINGS["betas"], SETTINGS["lr"]
    for step in range(steps):
        gradient = noisy_gradient(weight, step)
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        unbiased = first / (1 - beta1 ** (step + 1)), second / (1 - beta2 ** (step + 1))
        weight = weight * (1 - rate * SETTINGS["weight_decay"])
        weight = weight - rate * unbiased[0] / (unbiased[1].sqrt() + SETTINGS["eps"])
    return weight


@pytest.mark.parametrize(
    ("states", "dtype", "bound"),
    [
        ("fp32", torch.float32, 1e-5),
        ("bf16", torch.float32, 0.01),
        ("8bit", torch.float32, 0.03),
        ("fp32", torch.bfloat16, 0.04),
        ("bf16", torch.bfloat16, 0.04),
        ("8bit", torch.bfloat16, 0.05),
    ],
)
def test_it_stays_near_adamw_in_float64(states: States, dtype: torch.dtype, bound: float) -> None:
    steps = 250
    p = start(dtype)
    run(AdamW([p], **SETTINGS, states=states), p, range(steps))
    expected = oracle(steps)
    error = (p.detach().double() - expected).norm() / expected.norm()
    assert error < bound


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_the_second_moment_follows_a_gradient_that_fades(states: States) -> None:
    """Rounded to nearest, a moment with decay 0.999 would stay where it was once."""
    p = start()
    optimizer = AdamW([p], **SETTINGS, states=states)
    for step in range(500):
        p.grad = torch.full((SIZE,), 1.0 if step < 100 else 0.1)
        p.grad[::2] = 1.0  # the others' scale stays up
        optimizer.step()
    second = optimizer._read(p, "exp_avg_sq")[1::2]
    expected = (1 - 0.999**100) * 0.999**400 + (1 - 0.999**400) * 0.01
    assert second.mean().item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("states", "width"), [("fp32", 8.0), ("bf16", 4.0), ("8bit", 2.0 + 8 / 256)])
def test_moments_take_as_many_bytes_as_promised(states: States, width: float) -> None:
    p = nn.Parameter(torch.zeros(1 << 20))
    p.grad = torch.ones_like(p)
    optimizer = AdamW([p], **SETTINGS, states=states)
    optimizer.step()
    held = sum(t.untyped_storage().nbytes() for t in optimizer.state[p].values())
    assert held == width * p.numel() + 4


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_bit_for_bit(states: States, dtype: torch.dtype) -> None:
    p = start(dtype)
    optimizer = AdamW([p], **SETTINGS, states=states, seed=5)
    run(optimizer, p, range(4))
    q = nn.Parameter(p.detach().clone())
    other = AdamW([q], **SETTINGS, states=states, seed=5)
    other.load_state_dict(optimizer.state_dict())
    for kept, loaded in zip(optimizer.state[p].values(), other.state[q].values(), strict=True):
        assert kept.dtype == loaded.dtype and torch.equal(kept, loaded)
    for each, weight in ((optimizer, p), (other, q)):
        torch.manual_seed(id(each) % 1000)  # whatever else the process draws
        run(each, weight, range(4, 8))
    assert torch.equal(p, q)
    if dtype == torch.bfloat16 or states != "fp32":
        r = start(dtype)
        run(AdamW([r], **SETTINGS, states=states, seed=6), r, range(8))
        assert not torch.equal(p, r), "another seed, other bits"


def test_a_state_in_float32_is_pytorchs() -> None:
    p, q = start(), start()
    theirs = torch.optim.AdamW([p], **SETTINGS)
    run(theirs, p, range(5))
    q.data.copy_(p.data)
    ours = AdamW([q], **SETTINGS)
    ours.load_state_dict(theirs.state_dict())
    run(theirs, p, range(5, 10))
    run(ours, q, range(5, 10))
    torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-7)
    assert ours.state_dict()["state"][0].keys() == theirs.state_dict()["state"][0].keys()


def test_weights_in_other_layouts_and_frozen_ones() -> None:
    conv = nn.Conv2d(16, 32, 3, bias=True)
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    conv.bias.requires_grad_(False)
    config = TrainingConfig(optimizer_states="8bit", weights_dtype="bf16", mixed_precision="bf16", learning_rate=0.1)
    before = conv.to(torch.bfloat16).bias.clone()
    optimizer = build_optimizer({"unet": conv}, config, seed=1)
    assert isinstance(optimizer, AdamW) and optimizer.states == "8bit" and optimizer.seed == 1
    old = conv.weight.detach().clone()
    conv(torch.ones(1, 16, 4, 4, dtype=torch.bfloat16)).float().sum().backward()
    optimizer.step()
    assert torch.equal(conv.bias, before) and conv.weight.is_contiguous(memory_format=torch.channels_last)
    moved = (conv.weight - old).float()
    assert (moved.sign() == -conv.weight.grad.float().sign()).float().mean() > 0.9
