"""Noise that frames share: its variance, its correlation, and that defaults leave every draw alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vdm.diffusion import NoiseSchedule, ddim_sample, ddpm_sample, related_frames, related_noise
from vdm.diffusion.schedule import DiffusionConfig

SHAPE = (4, 6, 16, 16)
strengths = st.sampled_from([0.0, 0.1, 0.5, 0.9])


def drawn(seed: int, *, correlation: float = 0.0, offset: float = 0.0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    return related_noise(noise, generator, correlation=correlation, offset=offset)


@given(st.integers(0, 2**31), strengths, st.sampled_from([0.0, 0.1, 1.0]))
def test_it_is_the_sum_that_it_says(seed: int, correlation: float, offset: float) -> None:
    """In float64, from the same draws in the same order."""
    generator = torch.Generator().manual_seed(seed)
    own, shared, level = (
        torch.randn(shape, generator=generator).double() for shape in (SHAPE, (4, 1, 16, 16), (4, 1, 1, 1))
    )
    expected = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own + offset * level
    ours = drawn(seed, correlation=correlation, offset=offset)
    assert ours.dtype == torch.float32 and ours.shape == SHAPE
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours, drawn(seed, correlation=correlation, offset=offset))


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_variance_and_correlation_between_frames(correlation: float, offset: float) -> None:
    """Of two frames at one place: covariance a + s^2; of two places of one frame s^2. 3000 clips: errors of 0.03."""
    clips = torch.stack([drawn(i, correlation=correlation, offset=offset, shape=(2, 2, 1, 2)) for i in range(3000)])
    numbers = clips.double().flatten(1)  # (N, channel x frame x place)
    covariance = numbers.T @ numbers / len(numbers)
    expected = torch.empty(8, 8, dtype=torch.float64)
    for i in range(8):
        for j in range(8):
            (c, f, p), (d, g, q) = ((k // 4, k // 2 % 2, k % 2) for k in (i, j))
            common = offset**2 if c == d else 0.0
            expected[i, j] = common + (p == q and c == d) * (1.0 if f == g else correlation)
    torch.testing.assert_close(covariance, expected, rtol=0.0, atol=0.12)
    assert numbers.mean().abs() < 0.05


def test_without_either_nothing_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPE, generator=generator)
    before = generator.get_state()
    assert related_noise(noise, generator) is noise
    assert torch.equal(generator.get_state(), before)


@given(strengths, strengths)
def test_neither_changes_the_draws_of_the_other(first: float, second: float) -> None:
    """What an offset adds does not depend on the correlation, unless there is none."""
    levels = [drawn(3, correlation=a, offset=1.0) - drawn(3, correlation=a) for a in (first, second)]
    torch.testing.assert_close(*levels, rtol=0.0, atol=1e-5)


def test_samplers_step_with_the_noise_that_was_trained() -> None:
    """A denoiser that sees nothing: what the frames then have in common is the noise of the steps."""
    schedule = NoiseSchedule(DiffusionConfig(num_train_timesteps=10))

    def frames(sampler: str, correlation: float) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        options = {"num_steps": 2, "generators": generators, "correlation": correlation}
        x = torch.zeros(2, *SHAPE)
        seen = []
        keep = lambda index, t, x: seen.append(x)  # noqa: E731
        sample = ddpm_sample if sampler == "ddpm" else lambda *a, **k: ddim_sample(*a, eta=1.0, **k)  # type: ignore[assignment]
        sample(lambda x, t: torch.zeros_like(x), x, schedule, callback=keep, **options)  # type: ignore[arg-type]
        return seen[0]

    for sampler in ("ddpm", "ddim"):
        free, tied = frames(sampler, 0.0), frames(sampler, 0.9)
        for x, low, high in ((free, -0.1, 0.1), (tied, 0.8, 1.0)):
            pair = torch.stack([x[:, :, 0].flatten(), x[:, :, 1].flatten()])
            assert low < float(torch.corrcoef(pair)[0, 1]) < high


def test_each_clip_of_a_batch_has_its_own() -> None:
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    both = related_frames(noise, [torch.Generator().manual_seed(i) for i in (1, 2)], 0.5)
    alone = related_frames(noise[1:], [torch.Generator().manual_seed(2)], 0.5)
    assert torch.equal(both[1:], alone)
