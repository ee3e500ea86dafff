"""How time steps are drawn."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vdm.errors import UserError
from vdm.training.draws import draw_timestep
from vdm.training.settings import TrainingConfig

UNIFORM = TrainingConfig()
LOGIT_NORMAL = TrainingConfig(timestep_sampling="logit_normal")


def drawn(recipe: TrainingConfig, *, num_steps: int = 1000, count: int = 4000) -> np.ndarray:
    draw = torch.Generator().manual_seed(0)
    return np.array([draw_timestep(num_steps, draw, recipe) for _ in range(count)])


@given(st.integers(1, 2000), st.floats(-50, 50), st.floats(1e-6, 50), st.sampled_from(["uniform", "logit_normal"]))
def test_every_draw_is_a_step(num_steps: int, mean: float, std: float, kind: str) -> None:
    recipe = TrainingConfig(timestep_sampling=kind, logit_mean=mean, logit_std=std)  # type: ignore[arg-type]
    steps = drawn(recipe, num_steps=num_steps, count=20)
    assert steps.min() >= 0 and steps.max() < num_steps


def test_uniform_draws_are_those_of_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    assert drawn(UNIFORM, count=50).tolist() == [int(torch.randint(1000, (), generator=draw)) for _ in range(50)]


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.8, 1.7), (1.0, 0.5)])
def test_logits_are_normal(mean: float, std: float) -> None:
    steps = drawn(replace(LOGIT_NORMAL, logit_mean=mean, logit_std=std))
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        logit = NormalDist(mean, std).inv_cdf(share)
        wanted = 1000 / (1 + np.exp(-logit))
        # Of 4000 draws a share has a standard error of at most 0.008; a step more or less is the rounding.
        assert (steps < wanted - 1).mean() - 0.03 < share < (steps < wanted + 1).mean() + 0.03


def test_both_leave_the_stream_at_the_same_place() -> None:
    ends = []
    for recipe in (UNIFORM, LOGIT_NORMAL):
        draw = torch.Generator().manual_seed(3)
        draw_timestep(1000, draw, recipe)
        ends.append(float(torch.rand((), generator=draw)))
    assert ends[0] == ends[1]


def test_a_deviation_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="logit_std must be above 0"):
        TrainingConfig(logit_std=0.0)
