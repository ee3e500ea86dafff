"""The inception score against values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vdm.errors import UserError
from vdm.metrics.inception import inception_score


def waves() -> Tensor:
    i, j = torch.arange(50, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64)
    return 3 * torch.sin(i * (j + 1))


def of(probabilities: list[list[float]]) -> float:
    return inception_score(torch.tensor(probabilities, dtype=torch.float64).log())[0]


def test_by_hand() -> None:
    classes = torch.eye(101, dtype=torch.float64)
    assert inception_score(classes.repeat(3, 1).log())[0] == pytest.approx(101, rel=1e-12)
    assert inception_score(classes.repeat(3, 1) * 1e4)[0] == pytest.approx(101, rel=1e-12)
    assert inception_score(classes[:1].repeat(7, 1).log())[0] == pytest.approx(1, abs=1e-12)
    assert inception_score(torch.zeros(5, 7))[0] == pytest.approx(1, abs=1e-12)
    assert of([[0.9, 0.1], [0.1, 0.9]]) == pytest.approx(1.4449348, abs=5e-8)
    assert of([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]]) == pytest.approx(2 ** (2 / 3), abs=1e-12)


def test_of_waves() -> None:
    assert inception_score(waves()) == (pytest.approx(2.0332308036, abs=5e-11), 0.0)
    splits = [1.787767, 2.030008, 1.796834, 2.035848, 2.003413]
    assert [inception_score(part)[0] for part in waves().split(10)] == pytest.approx(splits, abs=5e-7)
    mean, std = inception_score(waves(), splits=5)
    assert mean == pytest.approx(np.mean(splits), abs=5e-7) and std == pytest.approx(np.std(splits), abs=1e-6)


def test_splits_are_contiguous_after_a_seeded_shuffle() -> None:
    by_class = (50 * torch.eye(4)).repeat_interleave(25, dim=0)
    assert inception_score(by_class, splits=4) == (pytest.approx(1), pytest.approx(0, abs=1e-12)), "one class a split"
    mean, std = inception_score(by_class, splits=4, seed=0)
    assert 3.5 < mean < 4 and std > 0
    assert inception_score(by_class, splits=4, seed=0) == (mean, std) != inception_score(by_class, splits=4, seed=1)
    assert inception_score(by_class, seed=0)[0] == pytest.approx(4), "one split has all, shuffled or not"
    # No clip is left out where splits are unequal: 7 in 2 are 4 and 3.
    halves = [inception_score(part)[0] for part in (waves()[:4], waves()[4:7])]
    assert inception_score(waves()[:7], splits=2)[0] == pytest.approx(np.mean(halves), abs=1e-12)


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 9), st.floats(0, 500))
def test_it_lies_between_one_and_the_number_of_classes(seed: int, n: int, classes: int, sharpness: float) -> None:
    logits = torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)) * sharpness
    kept = logits.clone()
    score, _ = inception_score(logits)
    assert 1 - 1e-9 <= score <= min(n, classes) * (1 + 1e-9)
    assert inception_score(logits.flip(0) + 3.0)[0] == pytest.approx(score, rel=1e-4), "float32 rounds the sum"
    assert inception_score(logits.double().flip(1) + 3.0)[0] == pytest.approx(score, rel=1e-9)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize(
    "bad", [torch.tensor([[0.0, math.nan]]), torch.tensor([[0.0, math.inf]]), torch.full((1, 2), -math.inf)]
)
def test_a_clip_without_probabilities_is_refused(bad: Tensor) -> None:
    with pytest.raises(UserError, match="NaN or infinity"):
        inception_score(torch.cat([torch.zeros(3, 2), bad]))


@pytest.mark.parametrize("splits", [0, 4])
def test_a_split_has_a_clip(splits: int) -> None:
    with pytest.raises(UserError, match=f"3 clips cannot be split in {splits}"):
        inception_score(torch.zeros(3, 2), splits=splits)


@pytest.mark.parametrize("logits", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(3, 2).long()])
def test_what_programmers_get_wrong(logits: Tensor) -> None:
    with pytest.raises(ValueError, match="logits are"):
        inception_score(logits)
