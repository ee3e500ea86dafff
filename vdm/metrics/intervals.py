"""How sure a number is: 95 % intervals of shares, means, differences of two runs, and statistics of two sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vdm.errors import UserError

Z95 = NormalDist().inv_cdf(0.975)  # a 95 % interval of what is normal reaches so many standard errors to each side


class PairedDifference(NamedTuple):
    """The mean of the first run less the second over what both have, and its 95 % interval."""

    mean: float
    low: float
    high: float
    num_pairs: int
    num_unpaired: int  # clips of either run that the other lacks


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The 95 % interval (low, high) of a share (Wilson 1927); of no trials, all of 0 to 1.

    `successes` of n may be a fraction, where ties give credit in part. Raises ValueError outside 0 to n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no share")
    z2 = Z95**2
    middle = successes + z2 / 2.0
    half = Z95 * math.sqrt(successes * (n - successes) / max(n, 1) + z2 / 4.0)
    low, high = (middle - half) / (n + z2), (middle + half) / (n + z2)
    return low if successes > 0 else 0.0, high if successes < n else 1.0  # exactly, whatever the root is rounded to


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval (low, high) of a median, from one of the values (N,) to another, whatever their distribution.

    How many values lie below the median is binomial (Conover 1999, section 3.2), if they are independent. Of fewer
    than 6 values it reaches from the least to the greatest, and is too narrow. Raises UserError for no values or NaN.
    """
    ordered = sorted(values)
    n = len(ordered)
    if not n or any(math.isnan(value) for value in ordered):
        raise UserError(f"there is no median of {n} values, some of them NaN; leave those clips out")
    rank, ways, so_far = 0, 1, 0  # of 2^n ways those by which `rank` values, or fewer, lie below
    while 40 * (so_far + ways) <= 2**n:
        so_far, rank, ways = so_far + ways, rank + 1, ways * (n - rank) // (rank + 1)
    return ordered[max(rank, 1) - 1], ordered[n - max(rank, 1)]


def bootstrap_mean(
    values: Tensor | Sequence[float], groups: Tensor | Sequence[Hashable], *, seed: int, draws: int = 2000
) -> tuple[float, float]:
    """The 95 % interval (low, high) of the mean of values (N,), by percentiles of a bootstrap over groups.

    groups (N,) labels, such as prompts: whole groups are drawn (Efron and Tibshirani 1993, ch. 8 and 13), since two
    clips of one prompt say less than clips of two. Labels of one type, which can be sorted; the order of values does
    not matter. It is too narrow below some 20 groups. For means only: resampled, a Frechet distance is biased upwards.
    Raises UserError for fewer than 2 groups or values that are not finite, ValueError where lengths differ.
    """
    sums, counts = _per_group(values, groups)
    if len(sums) < 2:
        raise UserError(f"an interval needs 2 different prompts or more; there are {len(sums)}")
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        chosen = generator.integers(len(sums), size=len(sums))
        means[draw] = sums[chosen].sum() / counts[chosen].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def jackknife(statistic: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor, *, blocks: int = 16) -> float:
    """The standard error of statistic(x (N, ...), y (M, ...)), both sets being samples: a block left out at a time.

    Efron and Tibshirani 1993, ch. 11, for each side while the other is whole, variances added: 2 `blocks` evaluations.
    A bias that all of them share, as that of a Frechet distance, does not count. Blocks are contiguous, so rows that
    belong together, such as the clips of one prompt, should be neighbours, and rows must not be sorted by class.
    Raises UserError for fewer rows than blocks.
    """
    if not 2 <= blocks <= min(len(x), len(y)):
        raise UserError(f"a standard error by {blocks} blocks needs as many clips; there are {len(x)} and {len(y)}")
    without_x = [statistic(part, y) for part in _leave_one_out(x, blocks)]
    without_y = [statistic(x, part) for part in _leave_one_out(y, blocks)]
    both = np.array([without_x, without_y], dtype=np.float64)
    return math.sqrt((blocks - 1) * both.var(axis=1).sum())


def paired_difference(
    first: Mapping[tuple[str, int], float], second: Mapping[tuple[str, int], float], *, seed: int, draws: int = 2000
) -> PairedDifference:
    """How much higher a number of each clip is in one run than in another, clip by clip: {(prompt, seed): value}.

    Two runs of the same prompts and seeds differ by far less than two runs at random, so a smaller difference shows.
    The interval is `bootstrap_mean`'s, over prompts. Raises UserError where the runs share fewer than 2 prompts.
    """
    pairs = sorted(first.keys() & second.keys())
    prompts = [prompt for prompt, _ in pairs]
    if len(set(prompts)) < 2:
        raise UserError(
            f"the two runs share {len(pairs)} clips of {len(set(prompts))} prompts, and 2 prompts or more are needed; "
            "generate both with the same prompts and seeds"
        )
    differences = [first[pair] - second[pair] for pair in pairs]
    low, high = bootstrap_mean(differences, prompts, seed=seed, draws=draws)
    num_unpaired = len(first.keys() ^ second.keys())
    return PairedDifference(math.fsum(differences) / len(pairs), low, high, len(pairs), num_unpaired)


def _per_group(values: Tensor | Sequence[float], groups: Tensor | Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts) of each group, in the order of labels; exact sums, so that the order within one is nothing."""
    numbers = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    if numbers.ndim != 1 or len(numbers) != len(groups):
        raise ValueError(f"values and groups are (N,), not {tuple(numbers.shape)} and ({len(groups)},)")
    if not numbers.isfinite().all():
        raise UserError("the values of some clips are NaN or infinite; leave those clips out")
    if isinstance(groups, Tensor):
        groups = groups.tolist()  # a tensor is no label: each is equal to itself alone
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(numbers.tolist(), groups, strict=True):
        members.setdefault(group, []).append(value)
    ordered = [members[group] for group in sorted(members)]  # type: ignore[type-var]
    return np.array([math.fsum(group) for group in ordered]), np.array([len(group) for group in ordered])


def _leave_one_out(rows: Tensor, blocks: int) -> list[Tensor]:
    parts = rows.tensor_split(blocks)
    return [torch.cat([*parts[:left], *parts[left + 1 :]]) for left in range(blocks)]
