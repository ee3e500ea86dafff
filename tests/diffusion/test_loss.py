"""The training loss: one float32 number a clip, from the schedule's target and weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vdm.diffusion import DiffusionConfig, NoiseSchedule, ddpm_loss, weighted_mse

T = torch.tensor([3, 400, 999])


def draws() -> tuple[Tensor, Tensor]:
    """x0 and noise, each (3, 4, 2, 3, 3)."""
    x0, noise = torch.randn(2, 3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    return x0, noise


@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("loss_weighting", ["uniform", "min_snr", "velocity"])
def test_loss_is_the_weighted_error_of_the_target(prediction_type: Any, loss_weighting: Any) -> None:
    schedule = NoiseSchedule(DiffusionConfig(prediction_type=prediction_type, loss_weighting=loss_weighting))
    x0, noise = draws()
    target = schedule.target(x0, noise, T)
    offset = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1, 1)
    seen: list[tuple[Tensor, Tensor]] = []

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append((x_t, t))
        return target + offset

    loss = ddpm_loss(predict, x0, noise=noise, t=T, schedule=schedule)
    torch.testing.assert_close(loss, torch.tensor([1.0, 4.0, 9.0]) * schedule.loss_weight(T))
    assert loss.shape == (3,) and len(seen) == 1
    assert torch.equal(seen[0][0], schedule.add_noise(x0, noise, T)) and torch.equal(seen[0][1], T)


def test_perfect_prediction_costs_nothing_and_zero_costs_the_power_of_the_noise() -> None:
    schedule = NoiseSchedule(DiffusionConfig())
    x0, noise = draws()
    assert ddpm_loss(lambda x, t: noise, x0, noise=noise, t=T, schedule=schedule).eq(0).all()
    loss = ddpm_loss(lambda x, t: torch.zeros_like(x), x0, noise=noise, t=T, schedule=schedule)
    torch.testing.assert_close(loss, noise.square().mean((1, 2, 3, 4)))


def test_a_clip_has_its_own_loss() -> None:
    schedule = NoiseSchedule(DiffusionConfig(prediction_type="v", loss_weighting="min_snr"))
    x0, noise = draws()

    def loss_of(clips: slice) -> Tensor:
        return ddpm_loss(lambda x, t: x.tanh(), x0[clips], noise=noise[clips], t=T[clips], schedule=schedule)

    assert torch.equal(loss_of(slice(0, 3))[1:2], loss_of(slice(1, 2)))


def test_low_precision_output_is_compared_in_float32() -> None:
    output = torch.full((2, 1000), 300.0, dtype=torch.float16)  # its square is beyond float16
    loss = weighted_mse(output, torch.zeros(2, 1000, dtype=torch.float16), torch.tensor([1.0, 0.5]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([90000.0, 45000.0]))


def test_gradient_reaches_the_network() -> None:
    schedule, gain = NoiseSchedule(DiffusionConfig(prediction_type="x0")), torch.tensor(0.5, requires_grad=True)
    x0, noise = draws()
    ddpm_loss(lambda x, t: gain * x, x0, noise=noise, t=T, schedule=schedule).mean().backward()
    x_t = schedule.add_noise(x0, noise, T)
    assert gain.grad is not None
    torch.testing.assert_close(gain.grad, (2 * (0.5 * x_t - x0) * x_t).mean())
