"""Schedules and timesteps against diffusers'; test_parity_table.py in tests/benchmarks has the sampling loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vdm.diffusion import DiffusionConfig, NoiseSchedule, ddim_sample, dpmpp_sample, initial_noise

pytestmark = pytest.mark.parity

LOOSE = {"rtol": 1e-4, "atol": 5e-5}
SCHEDULES = ["linear", "scaled_linear", "cosine"]


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return pytest.importorskip("diffusers")


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def network(x: Tensor, t: Tensor) -> Tensor:
    """Any smooth function of x and t will do as the denoiser of a parity test."""
    return (1.3 * x + 0.2).sin() + 0.3 * (t / 1000).reshape(-1, *[1] * (x.ndim - 1))


def diffusers_path(scheduler: Any, x: Tensor, num_steps: int, **step: Any) -> list[Tensor]:
    scheduler.set_timesteps(num_steps)
    path = []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(len(x))), int(t), x, **step).prev_sample
        path.append(x)
    return path


def check_paths(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Same paths, but for diffusers' float32 products: their relative error in alpha_bar is about 1e-5."""
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_the_schedule_and_the_forward_process(diffusers: Any, beta_schedule: Any, zero_terminal_snr: bool) -> None:
    config = DiffusionConfig(prediction_type="v", beta_schedule=beta_schedule, zero_terminal_snr=zero_terminal_snr)
    schedule = NoiseSchedule(config)
    named = {"beta_schedule": "squaredcos_cap_v2" if beta_schedule == "cosine" else beta_schedule}
    named |= {"beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": zero_terminal_snr}
    x0, noise = torch.randn(2, 4, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 500, 999])
    for fields in (named, {"trained_betas": schedule.trained_betas()}):
        for scheduler in (diffusers.DDIMScheduler(**fields), diffusers.DDPMScheduler(**fields)):
            # diffusers rounds each beta and each partial product to float32, and so is off by up to 1e-7 a step.
            torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod, rtol=2e-4, atol=2e-7)
            torch.testing.assert_close(schedule.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t), **LOOSE)
            torch.testing.assert_close(schedule.velocity(x0, noise, t), scheduler.get_velocity(x0, noise, t), **LOOSE)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("total", [1000, 333])
def test_the_timesteps(diffusers: Any, spacing: Any, total: int) -> None:
    schedule = NoiseSchedule(DiffusionConfig(num_train_timesteps=total, timestep_spacing=spacing))
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=total, timestep_spacing=spacing, steps_offset=1)
    for num_steps in range(1, total):
        scheduler.set_timesteps(num_steps)
        # For some numbers (61 of 1000) diffusers' float arithmetic yields one step too many, which is -1.
        theirs = [step for step in scheduler.timesteps.tolist() if step >= 0]
        assert schedule.timesteps(num_steps).tolist() == theirs


def test_the_named_zero_terminal_snr(diffusers: Any) -> None:
    """The export needs no trained betas for a plain schedule: diffusers' own rescale gives the same path."""
    schedule = NoiseSchedule(DiffusionConfig(prediction_type="v", zero_terminal_snr=True))
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True,
        prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing",
    )  # fmt: skip
    x = initial_noise((4, 2, 3, 3), generators(0, 1))
    check_paths([ddim_sample(network, x, schedule, num_steps=50)], diffusers_path(scheduler, x, 50)[-1:])


@pytest.mark.parametrize("num_steps", [5, 20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "x0"])
def test_dpmpp(diffusers: Any, prediction_type: Any, num_steps: int) -> None:
    schedule = NoiseSchedule(DiffusionConfig(prediction_type=prediction_type))
    scheduler = diffusers.DPMSolverMultistepScheduler(
        trained_betas=schedule.trained_betas(), timestep_spacing="trailing", final_sigmas_type="zero",
        prediction_type={"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction_type],
    )  # fmt: skip
    x, path = initial_noise((4, 2, 3, 3), generators(0, 1)), []
    dpmpp_sample(network, x, schedule, num_steps=num_steps, callback=lambda index, t, x: path.append(x))
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == schedule.timesteps(num_steps).tolist()
    check_paths(path, diffusers_path(scheduler, x, num_steps))
