"""What becomes of rows: mean or median of clips, the distance of two sets, or the score of one; and how sure it is.

All of them are called alike, so a metric holds one of them and nobody asks which.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdm.evaluation.extract import Side
from vdm.evaluation.records import digest
from vdm.metrics.intervals import Z95, bootstrap_mean, jackknife, median_interval, wilson

SEED = 0
BLOCKS = 16  # of the jackknife
Interval = tuple[float, float]
Columns = tuple[int, int | None]  # from, and up to
ALL: Columns = (0, None)
Values = npt.NDArray[np.float64]


class Unmeasurable(Exception):
    """There is no value for these clips; the sentence says what they lack."""


@dataclass(frozen=True)
class Found:
    """What a measure makes of two sides. `values` are those of single clips (N,), NaN where one does not count, None
    where no clip has one of its own; `chance` is the value of choices without meaning. The interval takes time, so it
    is asked for apart, and raises Unmeasurable too."""

    value: float
    count: int
    interval: Callable[[], Interval | None]
    values: Values | None = None
    valid: bool = True
    chance: float | None = None


@dataclass(frozen=True)
class PerClip:
    """The mean of a number that each clip has: `values(side, reference)` are (N,), NaN where a clip does not count.

    The interval is a bootstrap over prompts, or Wilson's for a share of clips where each has its own prompt: clips of
    one prompt are alike, and Wilson's would count them as if they were not. `chance` is of each clip what a choice
    without meaning would give it.
    """

    values: Callable[[Side, Side], Values]
    share: bool = False
    chance: Callable[[Side, Side], Values] | None = None
    one_sided: bool = True

    def __call__(self, generated: Side, reference: Side) -> Found:
        """Raises Unmeasurable."""
        values = self.values(generated, reference)
        counted = np.isfinite(values)
        if not counted.any():
            raise Unmeasurable("it applies to none of the clips")
        total, count = math.fsum(values[counted]), int(counted.sum())

        def interval() -> Interval | None:
            prompts = [clip.prompt for clip, counts in zip(generated.clips, counted, strict=True) if counts]
            num_prompts = len(set(prompts))
            if self.share and num_prompts == count:
                return wilson(total, count)
            if num_prompts < 2:
                return None
            low, high = bootstrap_mean(torch.from_numpy(values[counted]), prompts, seed=SEED)
            # All prompts alike, as where all clips are right: a bootstrap takes that for certainty.
            return wilson(total / count * num_prompts, num_prompts) if self.share and low == high else (low, high)

        chance = None if self.chance is None else float(self.chance(generated, reference)[counted].mean())
        return Found(total / count, count, interval, values, chance=chance)


@dataclass(frozen=True)
class Median:
    """The middle of a number that each clip has, with an interval from one value of these to another."""

    values: Callable[[Side, Side], Values]
    one_sided: bool = True

    def __call__(self, generated: Side, reference: Side) -> Found:
        """Raises Unmeasurable."""
        values = self.values(generated, reference)
        # Single values are not given away: the mean of their differences is not the difference of the middles.
        return Found(float(np.median(values)), len(values), lambda: median_interval(values.tolist()))


@dataclass(frozen=True)
class Distance:
    """How far apart two sets of features are. `least` clips are needed for a value, `trusted` for a valid one.

    The interval is 1.96 standard errors of a block jackknife about the value, for a bootstrap would be biased. It is
    one of the value at this number of clips: the bias of that is not in it.
    """

    of: Callable[[Tensor, Tensor], float]
    columns: Columns = ALL
    least: int = 2
    trusted: int = 2
    certain: bool = True  # whether an interval is worth its time
    shifts: bool = True  # with the number of clips
    one_sided: bool = False

    def __call__(self, generated: Side, reference: Side) -> Found:
        """Raises Unmeasurable."""
        fewer = min(len(generated.clips), len(reference.clips))
        if fewer < self.least:
            raise Unmeasurable(f"needs at least {self.least} clips on each side, and there are {fewer}")
        x, y = (_features(side, self.columns) for side in (generated, reference))
        value, blocks = self.of(x, y), min(BLOCKS, len(x) // 2, len(y) // 2)

        def interval() -> Interval | None:
            if not self.certain or blocks < 2:
                return None
            half = Z95 * jackknife(self.of, x, y, blocks=blocks)
            return value - half, value + half

        return Found(value, len(generated.clips), interval, valid=fewer >= self.trusted)


@dataclass(frozen=True)
class Score:
    """A number of one set of clips as a whole, with the interval of a `Distance`."""

    of: Callable[[Tensor], float]
    columns: Columns = ALL
    least: int = 2
    certain: bool = True
    one_sided: bool = True

    def __call__(self, generated: Side, reference: Side) -> Found:
        """Raises Unmeasurable."""
        # The jackknife leaves out blocks of the other side as well, which changes nothing and so adds no variance.
        of = Distance(lambda x, y: self.of(x), self.columns, self.least, certain=self.certain)
        return of(generated, generated)


Measure = PerClip | Median | Distance | Score


def column(index: int, *, share: bool = False) -> PerClip:
    """The mean of one column of the rows."""
    return PerClip(lambda side, reference: side.rows[:, index].astype(np.float64), share)


def _features(side: Side, columns: Columns) -> Tensor:
    """(N,D), with the clips of one prompt together, and prompts in an order that means nothing: as blocks want it."""
    order = sorted(range(len(side.clips)), key=lambda i: (digest(side.clips[i].prompt), side.clips[i].id))
    return torch.from_numpy(np.ascontiguousarray(side.rows[order, slice(*columns)]))
