"""The learning rate's course, and the optimizer's settings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vdm.training.optim import build_optimizer, learning_rate
from vdm.training.settings import TrainingConfig


@st.composite
def schedules(draw: st.DrawFn) -> TrainingConfig:
    return TrainingConfig(
        learning_rate=draw(st.floats(1e-7, 1.0)),
        lr_scheduler=draw(st.sampled_from(["cosine", "constant"])),
        warmup_steps=draw(st.integers(0, 50)),
        max_train_steps=draw(st.integers(1, 200)),
    )


@given(schedules())
def test_the_rate_rises_to_its_peak_then_never_rises_again(config: TrainingConfig) -> None:
    rates = [learning_rate(step, config) for step in range(config.max_train_steps + 20)]
    warm = config.warmup_steps
    assert all(0.0 <= rate <= config.learning_rate * (1 + 1e-12) for rate in rates)
    assert all(rates[step] > 0.0 for step in range(config.max_train_steps)), "no step is wasted"
    for step in range(min(warm, len(rates))):
        assert rates[step] == pytest.approx(config.learning_rate * (step + 1) / warm)
    after = rates[warm:]
    assert all(later <= earlier for earlier, later in zip(after, after[1:], strict=False))
    assert not after or after[0] == pytest.approx(config.learning_rate)


@given(schedules())
def test_cosine_ends_at_zero_and_is_symmetric(config: TrainingConfig) -> None:
    first, last = config.warmup_steps, config.max_train_steps
    if config.lr_scheduler == "constant":
        assert learning_rate(first + 1000, config) == config.learning_rate
        return
    assert learning_rate(max(first, last), config) == pytest.approx(0.0 if last > first else config.learning_rate)
    assert learning_rate(max(first, last) + 1000, config) == pytest.approx(0.0, abs=1e-12)
    for step in range(first, last):
        both = learning_rate(step, config) + learning_rate(first + last - step, config)
        assert both == pytest.approx(config.learning_rate)


def test_the_middle_of_the_reference_recipe() -> None:
    config = TrainingConfig(learning_rate=1e-4, warmup_steps=1000, max_train_steps=100_000)
    assert learning_rate(0, config) == pytest.approx(1e-7)
    assert learning_rate(999, config) == learning_rate(1000, config) == pytest.approx(1e-4)
    assert learning_rate(50_500, config) == pytest.approx(5e-5)


def test_the_optimizer_takes_the_config_at_its_word() -> None:
    frozen, free = nn.LayerNorm(2).requires_grad_(False), nn.LayerNorm(3, bias=False)
    config = TrainingConfig(learning_rate=0.3, adam_beta1=0.5, adam_beta2=0.25, epsilon=1e-3, weight_decay=0.125)
    optimizer = build_optimizer({"frozen": frozen, "free": free}, config)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [parameter is free.weight for parameter in group["params"]] == [True]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.3, (0.5, 0.25), 1e-3, 0.125)


def test_one_step_is_adamw_as_published() -> None:
    """First step of Loshchilov and Hutter 2019, algorithm 2: the bias-corrected moments are g and g squared."""
    module = nn.LayerNorm(2, bias=False, dtype=torch.float64)
    weight = module.weight
    weight.data = torch.tensor([2.0, -1.0], dtype=torch.float64)
    config = TrainingConfig(learning_rate=0.1, weight_decay=0.5, epsilon=1e-2)
    gradient = torch.tensor([0.5, -0.25], dtype=torch.float64)
    expected = weight.detach() * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 1e-2)
    weight.grad = gradient.clone()
    build_optimizer({"unet": module}, config).step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=0.0)
