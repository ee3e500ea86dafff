"""Intervals hold the truth as often as they say, by simulation and by formula."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vdm.errors import UserError
from vdm.metrics.frechet import frechet_distance
from vdm.metrics.intervals import Z95, bootstrap_mean, jackknife, median_interval, paired_difference, wilson

# Shares


def test_shares_by_hand() -> None:
    assert wilson(90, 100) == pytest.approx((0.826, 0.945), abs=5e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=5e-5)
    assert wilson(10, 10) == pytest.approx((1 - 0.2775, 1), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0), "no trials say nothing"
    low, high = wilson(7.5, 20)
    assert wilson(7, 20)[0] < low < wilson(8, 20)[0] and wilson(7, 20)[1] < high < wilson(8, 20)[1]
    for successes, n in ((-1, 10), (11, 10), (math.nan, 10)):
        with pytest.raises(ValueError, match="no share"):
            wilson(successes, n)


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_the_ends_of_a_share_are_where_a_test_would_reject(n: int, share: float) -> None:
    """Wilson's own definition: p is an end if (share - p)^2 = z^2 p (1 - p) / n."""
    successes = round(share * n)
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    for end in (low, high):
        assert (successes / n - end) ** 2 == pytest.approx(Z95**2 * end * (1 - end) / n, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize(("n", "ranks"), [(6, (1, 6)), (10, (2, 9)), (20, (6, 15)), (100, (40, 61))])
def test_medians_by_the_tables(n: int, ranks: tuple[int, int]) -> None:
    values = np.random.default_rng(n).permutation(n) + 1.0
    assert median_interval(values.tolist()) == ranks


@given(st.integers(6, 300))
def test_medians_are_covered_by_no_more_than_is_needed(n: int) -> None:
    """Exactly, by the binomial distribution."""
    low, high = (int(rank) for rank in median_interval(range(1, n + 1)))
    assert low + high == n + 1, "as far from the one end as from the other"

    def covered(rank: int) -> float:
        return sum(math.comb(n, below) for below in range(rank, n - rank + 1)) / 2**n

    assert covered(low) >= 0.95 > covered(low + 1)


def test_medians_of_few_values_and_of_none() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0) and median_interval([5.0]) == (5.0, 5.0)
    for values in ([], [1.0, math.nan]):
        with pytest.raises(UserError, match="no median"):
            median_interval(values)


def test_shares_are_covered() -> None:
    """Exactly, by the binomial distribution, on average over all true shares."""
    n = 40
    intervals = np.array([wilson(successes, n) for successes in range(n + 1)])
    chosen = np.array([math.comb(n, successes) for successes in range(n + 1)], dtype=float)
    truths = np.linspace(0.02, 0.98, 193)
    successes = np.arange(n + 1)
    covered = [
        np.sum((chosen * p**successes * (1 - p) ** (n - successes))[(intervals[:, 0] <= p) & (p <= intervals[:, 1])])
        for p in truths
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01) and min(covered) > 0.83


@pytest.mark.parity
def test_shares_by_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for successes, n in ((0, 1), (1, 1), (3, 7), (90, 100), (1234, 60000)):
        assert wilson(successes, n) == pytest.approx(stats.binomtest(successes, n).proportion_ci(method="wilson"))


# Means


def prompts(n: int, *, seeds: int) -> list[str]:
    return [f"prompt {number // seeds}" for number in range(n)]


def test_an_interval_of_independent_values_is_that_of_the_normal_distribution() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_mean(values, range(400), seed=0)
    half = Z95 * values.std().item() / 20
    assert (low, high) == pytest.approx((values.mean().item() - half, values.mean().item() + half), abs=0.1 * half)


def test_more_seeds_of_one_prompt_say_nothing_new() -> None:
    values = np.random.default_rng(0).normal(size=50)
    once = bootstrap_mean(values.tolist(), prompts(50, seeds=1), seed=0)
    thrice = bootstrap_mean(np.repeat(values, 3).tolist(), prompts(150, seeds=3), seed=0)
    assert thrice == pytest.approx(once, abs=1e-12)
    alone = bootstrap_mean(np.repeat(values, 3).tolist(), range(150), seed=0)
    assert (alone[1] - alone[0]) * 1.5 < once[1] - once[0], "as if all were independent it would be too narrow"


def test_prompts_of_more_clips_weigh_more() -> None:
    low, high = bootstrap_mean([0.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"], seed=0)
    assert (low, high) == (0.0, 1.0)
    low, high = bootstrap_mean([0.0] * 20 + [1.0] * 60, [*range(20), *(20 + i // 3 for i in range(60))], seed=0)
    assert low < 0.75 < high and (low + high) / 2 > 0.65, "of clips, not of prompts, whose mean is a half"


@given(st.permutations(range(12)))
def test_the_order_of_clips_does_not_matter(order: list[int]) -> None:
    values, groups = np.random.default_rng(1).normal(size=12), np.array(prompts(12, seeds=3))
    expected = bootstrap_mean(values.tolist(), groups.tolist(), seed=5, draws=20)
    assert bootstrap_mean(torch.tensor(values[order]), groups[order].tolist(), seed=5, draws=20) == expected


def test_labels_may_be_a_tensor_and_seeds_differ() -> None:
    values, labels = torch.arange(12.0), torch.arange(12) // 3
    expected = bootstrap_mean(values, labels.tolist(), seed=0)
    assert bootstrap_mean(values, labels, seed=0) == expected != bootstrap_mean(values + values**2 / 99, labels, seed=0)
    spread = torch.randn(30, generator=torch.Generator().manual_seed(0))
    assert bootstrap_mean(spread, range(30), seed=0) != bootstrap_mean(spread, range(30), seed=1)


def test_means_of_prompts_are_covered() -> None:
    """40 prompts of 3 clips, whose values share most of their variance: 200 times over."""
    generator = np.random.default_rng(7)
    groups = prompts(120, seeds=3)
    covered = independent = 0
    for trial in range(200):
        values = np.repeat(generator.exponential(size=40), 3) + 0.3 * generator.normal(size=120)
        low, high = bootstrap_mean(values.tolist(), groups, seed=trial, draws=150)
        covered += low <= 1.0 <= high
        low, high = bootstrap_mean(values.tolist(), range(120), seed=trial, draws=150)
        independent += low <= 1.0 <= high
    assert 0.89 <= covered / 200 <= 0.97
    assert independent / 200 < 0.85, "what the clusters are for"


@pytest.mark.parity
def test_means_by_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).exponential(size=60)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=0).confidence_interval
    ours = bootstrap_mean(values.tolist(), range(60), seed=0, draws=9999)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.04 * (theirs.high - theirs.low))


def test_means_that_are_refused() -> None:
    with pytest.raises(UserError, match="2 different prompts or more; there are 1"):
        bootstrap_mean([1.0, 2.0], ["a", "a"], seed=0)
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match="NaN or infinite"):
            bootstrap_mean([1.0, bad], ["a", "b"], seed=0)
    with pytest.raises(ValueError, match=r"not \(2,\) and \(3,\)"):
        bootstrap_mean([1.0, 2.0], ["a", "b", "c"], seed=0)
    with pytest.raises(ValueError, match="values and groups"):
        bootstrap_mean(torch.zeros(2, 1), ["a", "b"], seed=0)


# Statistics of two sets


def difference(x: Tensor, y: Tensor) -> float:
    return (x.mean() - y.mean()).item()


def test_the_standard_error_of_a_difference_is_the_textbook_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, generator=generator).double(), 3 * torch.randn(16, generator=generator).double()
    assert jackknife(difference, x, y) == pytest.approx(math.sqrt((x.var() + y.var()) / 16), rel=1e-12)
    # Whole blocks count as one, whatever is in them; sides may be of any length.
    wide = x.repeat_interleave(5)
    assert jackknife(difference, wide, y) == pytest.approx(jackknife(difference, x, y), rel=1e-12)
    few = jackknife(difference, x[:8], y, blocks=4)
    means = [side.reshape(4, -1).mean(1).var() / 4 for side in (x[:8], y)]
    assert few == pytest.approx(math.sqrt(sum(means)), rel=1e-12)


def test_rows_are_left_out_once_each() -> None:
    seen: list[tuple[int, int]] = []
    x, y = torch.arange(7), torch.arange(10, 19)

    def note(a: Tensor, b: Tensor) -> float:
        seen.append((len(a), len(b)))
        left_out = {*x.tolist(), *y.tolist()} - {*a.tolist(), *b.tolist()}
        return float(sum(left_out))

    jackknife(note, x, y, blocks=3)
    assert seen == [(4, 9), (5, 9), (5, 9), (7, 6), (7, 6), (7, 6)]
    assert jackknife(lambda a, b: 1.0, x, y, blocks=3) == 0.0


def test_a_frechet_distance_varies_as_its_standard_error_says() -> None:
    """True standard deviation from 60 pairs of samples, errors from 8 of them; bias is large beside both."""
    generator = torch.Generator().manual_seed(2)
    samples = [torch.randn(2, 320, 6, generator=generator) for _ in range(60)]
    scales = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.2])
    pairs = [(scales * x + 0.2, scales.flip(0) * y) for x, y in samples]
    truth = np.std([frechet_distance(x, y) for x, y in pairs], ddof=1)
    errors = [jackknife(frechet_distance, x, y) for x, y in pairs[:8]]
    assert np.mean(errors) == pytest.approx(truth, rel=0.25)


def test_a_standard_error_needs_rows() -> None:
    for x, y, blocks in ((15, 20, 16), (20, 15, 16), (20, 20, 1)):
        with pytest.raises(UserError, match=f"by {blocks} blocks needs as many clips; there are {x} and {y}"):
            jackknife(difference, torch.zeros(x), torch.zeros(y), blocks=blocks)


# Two runs


def test_two_runs_by_hand() -> None:
    first = {("a", 0): 3.0, ("a", 1): 2.0, ("b", 0): 5.0, ("c", 0): 100.0}
    second = {("b", 0): 4.0, ("a", 1): 1.0, ("a", 0): 2.0, ("a", 2): -100.0}
    assert paired_difference(first, second, seed=0) == (1.0, 1.0, 1.0, 3, 2)
    assert paired_difference(second, first, seed=0) == (-1.0, -1.0, -1.0, 3, 2)


def test_pairing_shows_a_difference_that_clips_hide() -> None:
    generator = np.random.default_rng(0)
    clips = [(f"prompt {number // 2}", number % 2) for number in range(80)]
    easy = generator.normal(size=80)
    first = dict(zip(clips, easy + 0.1 + 0.1 * generator.normal(size=80), strict=True))
    second = dict(zip(clips, easy + 0.1 * generator.normal(size=80), strict=True))
    found = paired_difference(first, second, seed=0)
    assert 0 < found.low < found.mean < found.high < 0.2
    assert found.mean == pytest.approx(np.mean([*first.values()]) - np.mean([*second.values()]), abs=1e-12)
    alone = [bootstrap_mean([*run.values()], [prompt for prompt, _ in run], seed=0) for run in (first, second)]
    assert alone[0][0] < alone[1][1], "their own intervals overlap"
    backwards = dict(reversed(first.items()))
    assert paired_difference(backwards, second, seed=0) == found


def test_seeds_of_one_prompt_are_kept_together() -> None:
    wins = np.random.default_rng(0).normal(size=30)
    once = {(f"prompt {number:02d}", 0): wins[number] for number in range(30)}
    often = {(prompt, seed): value for (prompt, _), value in once.items() for seed in range(4)}
    expected = paired_difference(once, dict.fromkeys(once, 0.0), seed=0)
    found = paired_difference(often, dict.fromkeys(often, 0.0), seed=0)
    assert found == (*(pytest.approx(value, abs=1e-12) for value in expected[:3]), 120, 0)


def test_runs_that_cannot_be_compared() -> None:
    for second in ({}, {("b", 0): 1.0}, {("a", 0): 1.0, ("a", 1): 2.0}):
        with pytest.raises(UserError, match="generate both with the same prompts and seeds"):
            paired_difference({("a", 0): 1.0, ("a", 1): 1.0, ("c", 1): 1.0}, second, seed=0)


def test_z() -> None:
    assert NormalDist().cdf(Z95) - NormalDist().cdf(-Z95) == pytest.approx(0.95, abs=1e-12)
