"""The schedule against float64 oracles, and its algebra; test_parity.py has diffusers'."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdm.diffusion import DiffusionConfig, NoiseSchedule
from vdm.errors import UserError

SCHEDULES = ["linear", "scaled_linear", "cosine"]


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> DiffusionConfig:
    """Any valid config, with the given fields fixed."""
    fields: dict[str, Any] = {
        "num_train_timesteps": draw(st.integers(2, 1200)),
        "beta_schedule": draw(st.sampled_from(SCHEDULES)),
        "beta_start": draw(st.floats(1e-5, 1e-2)),
        "beta_end": draw(st.floats(1e-2, 2e-2)),
        "noise_shift": draw(st.sampled_from([1.0, 0.3, 5.0])),
        "zero_terminal_snr": draw(st.booleans()),
        "prediction_type": draw(st.sampled_from(["epsilon", "v", "x0"])),
    } | fixed
    if fields["prediction_type"] == "epsilon":
        fields["zero_terminal_snr"] = False
    return DiffusionConfig(**fields)


def oracle(config: DiffusionConfig) -> np.ndarray:
    """alphas_cumprod (N,) in float64, term by term from the papers' formulas."""
    steps, product, result = config.num_train_timesteps, 1.0, []
    for i in range(steps):
        share = i / (steps - 1)
        if config.beta_schedule == "linear":
            beta = config.beta_start + share * (config.beta_end - config.beta_start)
        elif config.beta_schedule == "scaled_linear":
            root = math.sqrt(config.beta_start) + share * (math.sqrt(config.beta_end) - math.sqrt(config.beta_start))
            beta = root * root
        else:
            now, before = (math.cos((k / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for k in (i + 1, i))
            beta = min(1 - now / before, 0.999)
        product *= 1 - beta
        result.append(product / (product + config.noise_shift**2 * (1 - product)))
    alpha_bar = np.array(result)
    if config.zero_terminal_snr:
        root = np.sqrt(alpha_bar)
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alpha_bar


@settings(max_examples=60, deadline=None)
@given(configs())
def test_schedule_equals_float64_oracle(config: DiffusionConfig) -> None:
    schedule, expected = NoiseSchedule(config), oracle(config)
    np.testing.assert_allclose(schedule.alphas_cumprod, expected, rtol=1e-6, atol=1e-37)
    np.testing.assert_allclose(schedule.signal, np.sqrt(expected), rtol=1e-6, atol=1e-19)
    np.testing.assert_allclose(schedule.noise, np.sqrt(1 - expected), rtol=1e-6)
    np.testing.assert_allclose(schedule.betas, 1 - expected / np.append(1.0, expected[:-1]), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(schedule.snrs, expected / (1 - expected), rtol=2e-6, atol=1e-37)


@settings(max_examples=60, deadline=None)
@given(configs())
def test_schedule_is_monotone(config: DiffusionConfig) -> None:
    schedule = NoiseSchedule(config)
    inner = schedule.alphas_cumprod[:-1]
    assert (inner > 0).all() and (schedule.alphas_cumprod <= 1).all()
    assert (schedule.alphas_cumprod.diff() <= 0).all() and (schedule.noise.diff() >= 0).all()
    assert (schedule.snrs.diff() < 0).all()
    assert (schedule.betas > 0).all() and (schedule.betas <= 1).all()
    last = config.num_train_timesteps - 1
    terminal = schedule.snr(torch.tensor([last])).item()
    assert (terminal == 0.0) is config.zero_terminal_snr
    assert (schedule.alphas_cumprod[-1].item() == 0.0) is config.zero_terminal_snr
    assert (schedule.betas[-1].item() == 1.0) is config.zero_terminal_snr


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_noise_shift_multiplies_noise_to_signal(beta_schedule: Any) -> None:
    plain = NoiseSchedule(DiffusionConfig(beta_schedule=beta_schedule))
    shifted = NoiseSchedule(DiffusionConfig(beta_schedule=beta_schedule, noise_shift=5.0))
    torch.testing.assert_close(shifted.noise / shifted.signal, 5.0 * plain.noise / plain.signal)


def test_zero_terminal_snr_keeps_the_first_step_and_is_affine_in_the_signal() -> None:
    plain = NoiseSchedule(DiffusionConfig())
    rescaled = NoiseSchedule(DiffusionConfig(prediction_type="v", zero_terminal_snr=True))
    assert rescaled.signal[0] == plain.signal[0] and rescaled.noise[0] == plain.noise[0]
    ratio = rescaled.signal.diff() / plain.signal.diff()
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0.0)


@settings(max_examples=30, deadline=None)
@given(configs())
def test_trained_betas_rebuild_the_schedule(config: DiffusionConfig) -> None:
    betas = NoiseSchedule(config).trained_betas()
    assert len(betas) == config.num_train_timesteps and all(isinstance(beta, float) for beta in betas)
    np.testing.assert_allclose(np.cumprod(1.0 - np.array(betas)), oracle(config), rtol=1e-9, atol=1e-37)


@pytest.mark.parametrize("t", [0, 300, 999])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_add_noise_has_the_stated_mean_and_variance(t: int, zero_terminal_snr: bool) -> None:
    config = DiffusionConfig(prediction_type="v", zero_terminal_snr=zero_terminal_snr)
    alpha_bar, count = oracle(config)[t], 200_000
    noise = torch.randn(2, count, generator=torch.Generator().manual_seed(t))
    x0 = torch.tensor([[0.8], [-2.0]]).expand(2, count)
    x_t = NoiseSchedule(config).add_noise(x0, noise, torch.tensor([t, t])).double()
    variance = 1 - alpha_bar
    # Five standard errors: of a mean sqrt(variance / n), of a variance variance * sqrt(2 / n).
    assert (x_t.mean(1) - math.sqrt(alpha_bar) * x0[:, 0]).abs().max() < 5 * math.sqrt(variance / count)
    assert (x_t.var(1) - variance).abs().max() < 5 * variance * math.sqrt(2 / count)


@settings(max_examples=60, deadline=None)
@given(config=configs(), seed=st.integers(0, 99), data=st.data())
def test_conversions_are_inverses(config: DiffusionConfig, seed: int, data: st.DataObject) -> None:
    schedule, generator = NoiseSchedule(config), torch.Generator().manual_seed(seed)
    last = config.num_train_timesteps - 1
    t = torch.tensor([0, last, data.draw(st.integers(0, last))])
    x0, noise = torch.randn(2, 3, 4, 2, 2, 2, generator=generator)
    x_t = schedule.add_noise(x0, noise, t)
    found_x0, found_eps = schedule.predictions(schedule.target(x0, noise, t), x_t, t)
    # What divides by an amplitude may lose as much precision as that amplitude is small.
    signal, amplitude = (table[t].reshape(3, 1, 1, 1, 1) for table in (schedule.signal, schedule.noise))
    x0_scale = signal if config.prediction_type == "epsilon" else 1.0
    eps_scale = amplitude if config.prediction_type == "x0" else 1.0
    assert ((found_x0 - x0) * x0_scale).abs().max() < 2e-6
    assert ((found_eps - noise) * eps_scale).abs().max() < 2e-6


def test_velocity_and_target() -> None:
    x0, noise, t = torch.full((2, 3), 2.0), torch.full((2, 3), -3.0), torch.tensor([10, 700])
    for prediction_type in ("epsilon", "v", "x0"):
        schedule = NoiseSchedule(DiffusionConfig(prediction_type=prediction_type))
        alpha_bar = oracle(schedule.config)[[10, 700], None]
        velocity = np.sqrt(alpha_bar) * -3.0 - np.sqrt(1 - alpha_bar) * 2.0
        np.testing.assert_allclose(schedule.velocity(x0, noise, t), np.broadcast_to(velocity, (2, 3)), rtol=1e-6)
        expected = {"epsilon": noise, "x0": x0, "v": schedule.velocity(x0, noise, t)}[prediction_type]
        assert torch.equal(schedule.target(x0, noise, t), expected)


def test_half_precision_is_lifted_to_float32() -> None:
    schedule, t = NoiseSchedule(DiffusionConfig(prediction_type="v")), torch.tensor([500, 20])
    half = torch.ones(2, 4, 1, 2, 2, dtype=torch.bfloat16)
    results = [
        schedule.add_noise(half, half, t),
        schedule.velocity(half, half, t),
        *schedule.predictions(half, half, t),
    ]
    assert all(result.dtype == torch.float32 for result in results)


@settings(max_examples=60, deadline=None)
@given(config=configs(), weighting=st.sampled_from(["min_snr", "velocity"]), gamma=st.sampled_from([1.0, 5.0, 20.0]))
def test_weights_are_one_weight_of_the_x0_error(config: DiffusionConfig, weighting: Any, gamma: float) -> None:
    """An x0 prediction that is off by d costs the same whichever way the network states it."""
    fields = {"loss_weighting": weighting, "min_snr_gamma": gamma, "noise_shift": config.noise_shift}
    fields |= {"beta_schedule": config.beta_schedule, "prediction_type": config.prediction_type}
    schedule = NoiseSchedule(DiffusionConfig(num_train_timesteps=100, **fields))
    t = torch.arange(100)
    snr = schedule.snrs.double()
    x0_weight = torch.minimum(snr if weighting == "min_snr" else snr + 1, torch.tensor(gamma))
    signal, amplitude = schedule.signal.double(), schedule.noise.double()
    # With x_t fixed, x0 off by d is eps off by -d * signal / noise and v off by -d / noise.
    error = {"x0": torch.ones_like(snr), "epsilon": signal / amplitude, "v": 1 / amplitude}[config.prediction_type]
    torch.testing.assert_close(schedule.loss_weight(t).double() * error**2, x0_weight, rtol=1e-5, atol=0.0)


def test_velocity_weighting_without_its_clamp_is_the_plain_v_loss() -> None:
    for zero_terminal_snr in (False, True):
        config = DiffusionConfig(
            prediction_type="v", loss_weighting="velocity", min_snr_gamma=1e9, zero_terminal_snr=zero_terminal_snr
        )
        torch.testing.assert_close(NoiseSchedule(config).loss_weights, torch.ones(1000))


@pytest.mark.parametrize("prediction_type", ["v", "x0"])
@pytest.mark.parametrize("loss_weighting", ["uniform", "min_snr", "velocity"])
def test_weights_are_finite_at_zero_snr(prediction_type: Any, loss_weighting: Any) -> None:
    fields = {"prediction_type": prediction_type, "loss_weighting": loss_weighting}
    weights = NoiseSchedule(DiffusionConfig(zero_terminal_snr=True, **fields)).loss_weight(torch.arange(1000))
    assert weights.isfinite().all() and (weights >= 0).all()
    assert weights[-1] == (0.0 if loss_weighting == "min_snr" else 1.0)


@settings(max_examples=100, deadline=None)
@given(total=st.integers(2, 1000), data=st.data())
def test_trailing_timesteps(total: int, data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(1, total))
    steps = NoiseSchedule(DiffusionConfig(num_train_timesteps=total)).timesteps(num_steps)
    assert steps.dtype == torch.long and len(steps) == num_steps
    assert steps[0] == total - 1 and steps[-1] >= 0 and (steps.diff() < 0).all()
    exact = total - total / num_steps * np.arange(num_steps) - 1
    assert np.abs(steps.numpy() - exact).max() < 0.5 + 1e-9


def test_timesteps_of_the_papers() -> None:
    assert NoiseSchedule(DiffusionConfig()).timesteps(4).tolist() == [999, 749, 499, 249]
    leading = NoiseSchedule(DiffusionConfig(timestep_spacing="leading"))
    assert leading.timesteps(50).tolist() == list(range(981, 0, -20))
    assert NoiseSchedule(DiffusionConfig(timestep_spacing="leading", steps_offset=0)).timesteps(4)[-1] == 0
    with pytest.raises(UserError, match=r"1000 sampling steps.*steps_offset 1"):
        leading.timesteps(1000)


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_number_of_steps_is_checked(num_steps: int) -> None:
    with pytest.raises(UserError, match=f"{num_steps} sampling steps.*1000"):
        NoiseSchedule(DiffusionConfig()).timesteps(num_steps)


def test_buffers_are_float32_on_the_cpu_and_not_saved() -> None:
    with torch.device("meta"):
        schedule = NoiseSchedule(DiffusionConfig())
    assert schedule.state_dict() == {}
    assert all(buffer.dtype == torch.float32 and buffer.device.type == "cpu" for buffer in schedule.buffers())


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_train_timesteps", 1),
        ("beta_schedule", "sigmoid"),
        ("beta_start", 0.0),
        ("beta_start", math.nan),
        ("beta_end", 1.0),
        ("beta_end", 0.0001),
        ("prediction_type", "noise"),
        ("noise_shift", 0.0),
        ("noise_shift", math.inf),
        ("loss_weighting", "snr"),
        ("min_snr_gamma", -5.0),
        ("timestep_spacing", "even"),
        ("ddim_stride", "long"),
        ("clip_sample_range", -1.0),
        ("sample_max_value", 0.5),
        ("dynamic_thresholding_ratio", 1.5),
        ("steps_offset", -1),
        ("steps_offset", 1000),
    ],
)
def test_bad_fields_are_named(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        DiffusionConfig(**{field: value})
    assert str(caught.value).startswith(f"{field} is {value!r}; it must ")


def test_bad_combinations_are_refused() -> None:
    with pytest.raises(UserError, match="epsilon.*zero_terminal_snr.*v or x0"):
        DiffusionConfig(zero_terminal_snr=True)
    with pytest.raises(UserError, match="beta_end 0.9"):
        NoiseSchedule(DiffusionConfig(beta_end=0.9))
    with pytest.raises(UserError, match="noise_shift 1e-12"):
        NoiseSchedule(DiffusionConfig(noise_shift=1e-12))
