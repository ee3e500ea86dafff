"""The samplers against exact Gaussian denoisers and against each other; test_parity.py has diffusers'."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdm.diffusion import (
    DiffusionConfig,
    NoiseSchedule,
    SamplingConfig,
    ddim_sample,
    ddpm_sample,
    dpmpp_sample,
    initial_noise,
)
from vdm.errors import UserError

MEAN, STD = 0.7, 0.4  # of the toy data, each element an independent Gaussian


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def amplitudes(schedule: NoiseSchedule, x_t: Tensor, t: Tensor) -> list[Tensor]:
    return [table[t].reshape(-1, *[1] * (x_t.ndim - 1)) for table in (schedule.signal, schedule.noise)]


def as_prediction(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """State the clean clip x0 as the network would, by the schedule's prediction type."""
    if schedule.config.prediction_type == "x0":
        return x0
    signal, amplitude = amplitudes(schedule, x_t, t)
    return schedule.target(x0, (x_t - signal * x0) / amplitude, t)


def gaussian_denoiser(schedule: NoiseSchedule) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact denoiser E[x0 | x_t] of the toy data."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        signal, amplitude = amplitudes(schedule, x_t, t)
        gain = signal * STD**2 / ((signal * STD) ** 2 + amplitude**2)
        return as_prediction(schedule, MEAN + gain * (x_t - signal * MEAN), x_t, t)

    return denoise


@st.composite
def schedules(draw: st.DrawFn) -> NoiseSchedule:
    prediction_type = draw(st.sampled_from(["epsilon", "v", "x0"]))
    return NoiseSchedule(
        DiffusionConfig(
            num_train_timesteps=draw(st.integers(2, 120)),
            beta_schedule=draw(st.sampled_from(["linear", "scaled_linear", "cosine"])),
            noise_shift=draw(st.sampled_from([1.0, 5.0])),
            prediction_type=prediction_type,
            zero_terminal_snr=prediction_type != "epsilon" and draw(st.booleans()),
        )
    )


@pytest.mark.parametrize("sample", [ddim_sample, dpmpp_sample])
@settings(max_examples=40, deadline=None)
@given(schedule=schedules(), data=st.data())
def test_with_the_true_noise_x0_is_recovered(sample: Any, schedule: NoiseSchedule, data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(1, schedule.config.num_train_timesteps))
    x0, noise = torch.randn(2, 2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(num_steps))
    first = schedule.timesteps(num_steps)[:1].expand(2)
    x = schedule.add_noise(x0, noise, first)
    found = sample(lambda x, t: schedule.target(x0, noise, t), x, schedule, num_steps=num_steps)
    # Finding x0 from the noise divides float32 rounding by the signal that is left at the first step.
    divisor = schedule.signal[first[0]].item() if schedule.config.prediction_type == "epsilon" else 1.0
    assert (found - x0).abs().max() < 1e-5 + 2e-6 / divisor


@settings(max_examples=40, deadline=None)
@given(schedule=schedules(), data=st.data())
def test_ddpm_and_ddim_with_eta_one_take_the_same_path(schedule: NoiseSchedule, data: st.DataObject) -> None:
    """Each step has the same mean and variance, hence from the same random numbers the same path."""
    num_steps = data.draw(st.integers(1, schedule.config.num_train_timesteps))
    denoise = gaussian_denoiser(schedule)
    x = initial_noise((3, 2, 2, 2), generators(0, 1))
    ddim = ddim_sample(denoise, x, schedule, num_steps=num_steps, eta=1.0, generators=generators(2, 3))
    ddpm = ddpm_sample(denoise, x, schedule, num_steps=num_steps, generators=generators(2, 3))
    torch.testing.assert_close(ddim, ddpm, rtol=1e-4, atol=2e-4)


def ancestral_moments(betas: np.ndarray) -> tuple[float, float]:
    """Mean and variance that ancestral sampling over all steps ends on, in float64 (Ho et al. 2020, eq. 7)."""
    alphas = 1.0 - betas
    alpha_bar = np.cumprod(alphas)
    before = np.append(1.0, alpha_bar[:-1])
    mean, variance = 0.0, 1.0
    for t in reversed(range(len(betas))):
        gain = math.sqrt(alpha_bar[t]) * STD**2 / (alpha_bar[t] * STD**2 + 1 - alpha_bar[t])
        intercept = MEAN * (1 - gain * math.sqrt(alpha_bar[t]))  # the denoiser is intercept + gain * x_t
        of_x0 = math.sqrt(before[t]) * betas[t] / (1 - alpha_bar[t])
        of_x = math.sqrt(alphas[t]) * (1 - before[t]) / (1 - alpha_bar[t])
        noise = (1 - before[t]) / (1 - alpha_bar[t]) * betas[t]
        mean = of_x0 * (intercept + gain * mean) + of_x * mean
        variance = (of_x0 * gain + of_x) ** 2 * variance + noise
    return mean, variance


def check_moments(x: Tensor, mean: float, variance: float, slack: float = 0.0) -> None:
    """Sample mean and variance within five standard errors, plus slack, of the stated ones."""
    count = x.numel()
    assert abs(x.double().mean().item() - mean) < 5 * math.sqrt(variance / count) + slack
    assert abs(x.double().var().item() - variance) < 5 * variance * math.sqrt(2 / count) + slack


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_ddpm_and_ddim_with_eta_one_have_the_exact_moments(zero_terminal_snr: bool) -> None:
    fields = {"num_train_timesteps": 50, "beta_end": 0.2, "zero_terminal_snr": zero_terminal_snr}
    schedule = NoiseSchedule(DiffusionConfig(prediction_type="v", **fields))
    moments = ancestral_moments(np.array(schedule.trained_betas()))
    denoise, x = gaussian_denoiser(schedule), initial_noise((50_000,), generators(10, 11, 12, 13))
    for seeds, sample in (((20, 21, 22, 23), ddpm_sample), ((30, 31, 32, 33), ddim_sample)):
        extra = {"eta": 1.0} if sample is ddim_sample else {}
        check_moments(sample(denoise, x, schedule, num_steps=50, generators=generators(*seeds), **extra), *moments)


@pytest.mark.parametrize("prediction_type", ["v", "x0"])
def test_ddim_converges_to_the_moments_of_the_data(prediction_type: Any) -> None:
    """With an affine denoiser DDIM is an affine map of its noise, so that two points tell its moments exactly."""
    schedule = NoiseSchedule(DiffusionConfig(prediction_type=prediction_type, zero_terminal_snr=True))
    missing = []
    for num_steps in (250, 500, 1000):
        x = torch.tensor([[0.0], [1.0]])
        at_0, at_1 = ddim_sample(gaussian_denoiser(schedule), x, schedule, num_steps=num_steps).flatten()
        assert abs(at_0 - MEAN) < 1e-4
        missing.append(STD - (at_1 - at_0).item())
    assert 0 < missing[2] < 0.01 * STD
    assert all(1.7 < coarse / fine < 2.3 for coarse, fine in zip(missing, missing[1:], strict=False))  # of first order


def test_dpmpp_converges_with_the_square_of_its_steps() -> None:
    """Up to its last step, which is of first order, against the exact path of a Gaussian's probability flow."""
    log_snr = torch.linspace(6.0, -6.0, 1000, dtype=torch.float64)  # so that all steps are equally long
    alpha_bar = log_snr.sigmoid()
    betas = (1.0 - alpha_bar / torch.cat([torch.ones(1).double(), alpha_bar[:-1]])).tolist()
    schedule = NoiseSchedule(DiffusionConfig(prediction_type="v", trained_betas=tuple(betas))).double()
    errors = []

    def exact(t: int, start: float) -> float:
        first = int(schedule.timesteps(25)[0])
        spread = [math.hypot(schedule.signal[i].item() * STD, schedule.noise[i].item()) for i in (first, t)]
        means = [schedule.signal[i].item() * MEAN for i in (first, t)]
        return means[1] + spread[1] / spread[0] * (start - means[0])

    for num_steps in (25, 50, 100):
        path: list[Tensor] = []
        x = torch.tensor([[1.0]], dtype=torch.float64)
        sampled = {"num_steps": num_steps, "callback": partial(_keep, path)}
        dpmpp_sample(gaussian_denoiser(schedule), x, schedule, **sampled)
        errors.append(abs(path[-2].item() - exact(int(schedule.timesteps(num_steps)[-1]), 1.0)))
    assert errors[0] < 0.01
    assert all(3.0 < coarse / fine < 5.0 for coarse, fine in zip(errors, errors[1:], strict=False)), errors


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_many_steps_give_the_moments_of_the_data(eta: float) -> None:
    schedule = NoiseSchedule(DiffusionConfig(prediction_type="v", zero_terminal_snr=True))
    x, random = initial_noise((20_000,), generators(1, 2, 3, 4)), generators(5, 6, 7, 8)
    x = ddim_sample(gaussian_denoiser(schedule), x, schedule, num_steps=500, eta=eta, generators=random)
    check_moments(x, MEAN, STD**2, slack=0.008)  # the number of steps is finite: see the test above


def test_noise_of_a_clip_is_its_own() -> None:
    batch = initial_noise((4, 3, 2, 2), generators(7, 8, 9))
    assert batch.shape == (3, 4, 3, 2, 2) and batch.dtype == torch.float32
    for i, seed in enumerate((7, 8, 9)):
        assert torch.equal(batch[i : i + 1], initial_noise((4, 3, 2, 2), generators(seed)))
    assert torch.equal(batch.flip(0), initial_noise((4, 3, 2, 2), generators(9, 8, 7)))


@pytest.mark.parametrize("eta", [0.0, 0.6, "ddpm", "dpmpp"])
@settings(max_examples=15, deadline=None)
@given(schedule=schedules(), seeds=st.lists(st.integers(0, 2**32), min_size=3, max_size=3))
def test_result_of_a_clip_does_not_depend_on_its_batch(eta: float | str, schedule: NoiseSchedule, seeds: Any) -> None:
    def sample(*own: int) -> Tensor:
        x = initial_noise((4, 3, 2, 2), generators(*own))
        num_steps, random = min(7, schedule.config.num_train_timesteps), generators(*[seed + 1 for seed in own])
        denoise = gaussian_denoiser(schedule)
        if eta == "dpmpp":
            return dpmpp_sample(denoise, x, schedule, num_steps=num_steps)
        if eta == "ddpm":
            return ddpm_sample(denoise, x, schedule, num_steps=num_steps, generators=random)
        return ddim_sample(denoise, x, schedule, num_steps=num_steps, eta=eta, generators=random)

    batch = sample(*seeds)
    for i, seed in enumerate(seeds):
        assert torch.equal(batch[i : i + 1], sample(seed))


def test_random_steps_are_random_and_repeatable() -> None:
    schedule = NoiseSchedule(DiffusionConfig())
    x, denoise = torch.zeros(2, 50), gaussian_denoiser(schedule)
    first, again, other = (
        ddpm_sample(denoise, x, schedule, num_steps=5, generators=generators(0, last)) for last in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert torch.equal(first[0], other[0]) and not torch.isclose(first[1], other[1]).any()


def test_eta_zero_leaves_the_generators_alone() -> None:
    schedule, random = NoiseSchedule(DiffusionConfig()), generators(4)
    before, x = random[0].get_state(), torch.ones(1, 5)
    with_them = ddim_sample(gaussian_denoiser(schedule), x, schedule, num_steps=5, generators=random)
    assert torch.equal(random[0].get_state(), before)
    assert torch.equal(with_them, ddim_sample(gaussian_denoiser(schedule), x, schedule, num_steps=5))


def _keep(path: list[Tensor], index: int, t: int, x: Tensor) -> None:
    path.append(x)


def test_spread_of_a_step_is_proportional_to_eta() -> None:
    schedule, differences = NoiseSchedule(DiffusionConfig()), []
    for eta in (0.3, 1.0):
        paths: list[list[Tensor]] = [[], []]
        for seed, path in enumerate(paths):
            x, keep = torch.ones(1, 50), partial(_keep, path)
            sampled = {"num_steps": 5, "eta": eta, "generators": generators(seed), "callback": keep}
            ddim_sample(gaussian_denoiser(schedule), x, schedule, **sampled)
        differences.append(paths[0][0] - paths[1][0])  # after the first step
    torch.testing.assert_close(differences[0], 0.3 * differences[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["v", "x0"])
@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_everything_is_finite_from_pure_noise(prediction_type: Any, num_steps: int) -> None:
    schedule = NoiseSchedule(DiffusionConfig(prediction_type=prediction_type, zero_terminal_snr=True))
    x, denoise = initial_noise((6,), generators(0)), gaussian_denoiser(schedule)
    assert ddim_sample(denoise, x, schedule, num_steps=num_steps).isfinite().all()
    assert ddim_sample(denoise, x, schedule, num_steps=num_steps, eta=1.0, generators=generators(1)).isfinite().all()
    assert ddpm_sample(denoise, x, schedule, num_steps=num_steps, generators=generators(1)).isfinite().all()


def test_ddim_can_end_on_the_alpha_of_step_zero() -> None:
    """The public ModelScope sampler: leading steps, offset 1, set_alpha_to_one false."""
    schedule = NoiseSchedule(DiffusionConfig(timestep_spacing="leading", set_alpha_to_one=False))
    x0, noise = torch.full((1, 3), 2.0), torch.full((1, 3), -1.0)
    x = schedule.add_noise(x0, noise, schedule.timesteps(50)[:1])
    found = ddim_sample(lambda x, t: noise, x, schedule, num_steps=50)
    torch.testing.assert_close(found, schedule.add_noise(x0, noise, torch.tensor([0])), rtol=0, atol=1e-4)
    # Ancestral sampling ends on a clean clip even so.
    found = ddpm_sample(partial(as_prediction, schedule, x0), x, schedule, num_steps=50, generators=generators(0))
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sample", [ddim_sample, ddpm_sample])
def test_denoiser_and_callback_see_every_step_once(sample: Any) -> None:
    schedule = NoiseSchedule(DiffusionConfig(prediction_type="x0"))
    asked: list[list[int]] = []
    told: list[tuple[int, int, Tensor]] = []
    weight = torch.ones((), requires_grad=True)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.float32 and t.dtype == torch.long
        asked.append(t.tolist())
        return (x * weight).half()

    def callback(index: int, t: int, x: Tensor) -> None:
        told.append((index, t, x))

    x = torch.ones(2, 3, dtype=torch.float16)
    found = sample(denoise, x, schedule, num_steps=4, generators=generators(0, 1), callback=callback)
    assert asked == [[999, 999], [749, 749], [499, 499], [249, 249]]
    assert [step[:2] for step in told] == [(0, 999), (1, 749), (2, 499), (3, 249)]
    assert found.dtype == torch.float32 and not found.requires_grad and torch.equal(found, told[-1][2])
    lifted = sample(lambda x, t: denoise(x, t).float(), x, schedule, num_steps=4, generators=generators(0, 1))
    assert torch.equal(found, lifted)


def test_bad_arguments_of_the_samplers() -> None:
    schedule, x = NoiseSchedule(DiffusionConfig()), torch.zeros(2, 3)
    denoise = gaussian_denoiser(schedule)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match=f"eta is {eta}"):
            ddim_sample(denoise, x, schedule, num_steps=5, eta=eta, generators=generators(0, 1))
    with pytest.raises(UserError, match="1001 sampling steps"):
        ddim_sample(denoise, x, schedule, num_steps=1001)
    with pytest.raises(UserError, match="one torch.Generator a clip"):
        ddim_sample(denoise, x, schedule, num_steps=5, eta=0.5)
    with pytest.raises(UserError, match="one torch.Generator a clip"):
        ddpm_sample(denoise, x, schedule, num_steps=5, generators=None)
    with pytest.raises(UserError, match="3 generators for 2 clips"):
        ddpm_sample(denoise, x, schedule, num_steps=5, generators=generators(0, 1, 2))


@pytest.mark.parametrize(
    "field, value",
    [("num_frames", 0), ("height", -8), ("width", 0), ("num_inference_steps", 0), ("sampling_fps", 0.0)]
    + [("sampling_fps", math.inf), ("sampler", "euler"), ("eta", 1.5), ("guidance_scale", math.nan)]
    + [("guidance_rescale", -0.5), ("pag_scale", -1.0), ("pag_scale", math.inf), ("pag_layers", "some")],
)
def test_bad_sampling_fields_are_named(field: str, value: Any) -> None:
    assert SamplingConfig().sampler == "ddim"
    with pytest.raises(UserError) as caught:
        SamplingConfig(**{field: value})
    assert str(caught.value).startswith(f"{field} is {value!r}; it must ")


@pytest.mark.parametrize("sampler", [ddim_sample, partial(ddim_sample, eta=1.0), ddpm_sample])
def test_a_step_visited_twice_in_pure_noise_changes_nothing(sampler: Callable[..., Tensor]) -> None:
    """The original's own steps go over the end of the schedule, and there stay at the last step."""
    for stride in ("visited", "constant"):
        fields = {"timestep_spacing": "modelscope", "zero_terminal_snr": True, "prediction_type": "v"}
        schedule = NoiseSchedule(DiffusionConfig(ddim_stride=stride, **fields))  # type: ignore[arg-type]
        assert schedule.timesteps(600)[:2].tolist() == [999, 999]
        x = initial_noise((2, 3), generators(0, 1))
        found = sampler(gaussian_denoiser(schedule), x, schedule, num_steps=600, generators=generators(2, 3))
        assert found.isfinite().all() and (found - MEAN).abs().max() < 6 * STD


def test_step_noise_of_a_video_is_drawn_frame_by_frame() -> None:
    schedule = NoiseSchedule(DiffusionConfig(prediction_type="x0"))
    seen: list[Tensor] = []
    ddpm_sample(
        lambda x, t: torch.zeros_like(x), torch.zeros(1, 2, 3, 4, 5), schedule, num_steps=2, generators=generators(7),
        callback=lambda index, t, x: seen.append(x),
    )  # fmt: skip
    drawn = torch.randn(3, 2, 4, 5, generator=generators(7)[0]).transpose(0, 1)
    ratio = seen[0][0] / drawn
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


@pytest.mark.parametrize("skip", [1, 4, 9])
def test_ddim_goes_on_from_where_steps_were_skipped(skip: int) -> None:
    schedule = NoiseSchedule(DiffusionConfig(prediction_type="v"))
    passed: list[Tensor] = []
    start, denoise = initial_noise((3, 4), generators(0, 1)), gaussian_denoiser(schedule)
    whole = ddim_sample(denoise, start, schedule, num_steps=10, callback=lambda index, t, x: passed.append(x))
    assert torch.equal(ddim_sample(denoise, passed[skip - 1], schedule, num_steps=10, skip=skip), whole)
    assert not torch.equal(ddim_sample(denoise, passed[skip - 1], schedule, num_steps=10), whole)
