"""Distances between two sets of features: Frechet's, its limit for endless sets, and the kernel distance.

All statistics are in float64 on the CPU: with 400 features float32 is wrong by a percent, and can go below zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vdm.errors import Failure, UserError

_ROWS = 1024  # of a kernel's matrix at a time


@dataclass(frozen=True, eq=False)
class Moments:
    """How many features there are, their mean, and their summed products about it: all that a Gaussian is fitted to.

    n; mean (D,) and m2 (D, D), both float64 on the CPU. Raises ValueError for other shapes or dtypes, UserError for
    what is not finite.
    """

    n: int
    mean: Tensor
    m2: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.m2.shape != (len(self.mean), len(self.mean)):
            raise ValueError(f"mean is (D,) and m2 (D, D), not {tuple(self.mean.shape)} and {tuple(self.m2.shape)}")
        if self.mean.dtype != torch.float64 or self.m2.dtype != torch.float64:
            raise ValueError(f"moments are float64, not {self.mean.dtype} and {self.m2.dtype}")
        if not (self.mean.isfinite().all() and self.m2.isfinite().all()):
            raise UserError("moments hold NaN or infinity; compute them anew from the clips")

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features (N, D) float32 or float64; N may be 0, as that of a process without clips is."""
        features = _checked(features)
        mean, deviations = _centred(features)
        return cls(len(features), mean, deviations.T @ deviations)

    def merge(self, other: Moments) -> Moments:
        """Of both sets together (Chan, Golub and LeVeque 1979), which is exact where sums of squares cancel."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {len(self.mean)} and of {len(other.mean)} features cannot be merged")
        n = self.n + other.n
        share = other.n / max(n, 1)
        apart = other.mean - self.mean
        m2 = self.m2 + other.m2 + torch.outer(apart, apart) * (self.n * share)
        return Moments(n, self.mean + apart * share, m2)

    def covariance(self, *, unbiased: bool = True) -> Tensor:
        """(D, D) float64, divided by n - 1, or by n where biased. Raises UserError for fewer than 2 features."""
        return self.m2 / _divisor(self.n, unbiased=unbiased)


def frechet_distance(x: Tensor, y: Tensor, *, unbiased: bool = True) -> float:
    """|mean_x - mean_y|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)) of features x (N, D) and y (M, D), float32 or float64.

    The Frechet distance of the Gaussians fitted to both (Dowson and Landau 1982; Unterthiner et al. 2018 for video).
    `unbiased` divides covariances by N - 1. N < D is allowed, but see `enough_clips`. It falls with N as about 1/N, so
    only numbers of equal N compare. Raises UserError for NaN, infinity or fewer than 2 rows, ValueError for shapes and
    dtypes.
    """
    _same_width(x, y)
    return _between(_spread(x, unbiased=unbiased), _spread(y, unbiased=unbiased))


def frechet_from_moments(a: Moments, b: Moments, *, unbiased: bool = True) -> float:
    """`frechet_distance` where features are no longer there, such as of a reference whose moments were kept.

    By the square roots of both covariances, to about as many digits. Raises UserError for fewer than 2 features or what
    is no covariance, ValueError where the two differ in width.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"moments of {len(a.mean)} and of {len(b.mean)} features have no distance")
    return _between(_spread_of_moments(a, unbiased=unbiased), _spread_of_moments(b, unbiased=unbiased))


def frechet_infinity(
    x: Tensor, y: Tensor, *, seed: int, unbiased: bool = True, num_sizes: int = 15, num_shuffles: int = 4
) -> float:
    """The Frechet distance that endless sets would have (Chong and Forsyth 2020): a line over 1/N, at 0.

    x (N, D) generated, y (M, D) reference. Of `num_sizes` sizes from max(2 D, N/4) to N, each the mean of
    `num_shuffles` subsets of x; where M = N, of y too, else all of y is taken, and its own bias stays. Which subsets,
    the seed and the order of rows say. It may be negative, and varies as much as the distance does.
    Raises as `frechet_distance`, and UserError below 3 D rows, from where a line would point anywhere.
    """
    _same_width(x, y)
    N, D = x.shape
    if 3 * D > N:
        raise UserError(f"the Frechet distance of endless sets needs {3 * D} generated clips or more; there are {N}")
    generator = torch.Generator().manual_seed(seed)
    whole = None if len(y) == N else _spread(y, unbiased=unbiased)
    sizes = torch.linspace(max(2 * D, N / 4), N, num_sizes, dtype=torch.float64).round().long()

    def subset(features: Tensor, size: int) -> _Spread:
        chosen = torch.randperm(N, generator=generator)[:size]
        return _spread(features[chosen.to(features.device)], unbiased=unbiased)

    distances = [
        [_between(subset(x, size), whole or subset(y, size)) for _ in range(num_shuffles)] for size in sizes.tolist()
    ]
    height = torch.tensor(distances, dtype=torch.float64).mean(1)
    inverse = sizes.double().reciprocal()
    along = inverse - inverse.mean()
    slope = (along @ height) / along.square().sum()
    return (height.mean() - slope * inverse.mean()).item()


def kernel_distance(x: Tensor, y: Tensor, *, unbiased: bool = True) -> float:
    """Squared MMD of features x (N, D) and y (M, D), float32 or float64, with the kernel (x.y / D + 1)^3.

    As KID (Binkowski et al. 2018), on all pairs at once. Unbiased it has mean 0 between sets of one distribution,
    whatever N is, and is then as often negative as not. Raises as `frechet_distance`.
    """
    _same_width(x, y)
    x, y = _checked(x), _checked(y)
    within = _self_similarity(x, unbiased=unbiased) + _self_similarity(y, unbiased=unbiased)
    value = within - 2.0 * _kernel(x, y).sum().item() / (len(x) * len(y))
    if not math.isfinite(value):
        raise Failure("the kernel distance is not finite: features are too large to be cubed")
    return value


def enough_clips(*counts: int, num_features: int) -> bool:
    """Whether Frechet distances of so many clips are to be trusted: no fewer than features, or covariances are flat."""
    return min(counts) >= num_features


@dataclass(frozen=True, eq=False)
class _Spread:
    """mean (D,), and root (min(N, D) or D, D) with root^T root = covariance."""

    mean: Tensor
    root: Tensor


def _spread(features: Tensor, *, unbiased: bool) -> _Spread:
    features = _checked(features)
    N, D = features.shape
    mean, deviations = _centred(features)
    root = deviations / math.sqrt(_divisor(N, unbiased=unbiased))
    return _Spread(mean, root if N <= D else torch.linalg.qr(root, mode="r").R)


def _spread_of_moments(moments: Moments, *, unbiased: bool) -> _Spread:
    values, vectors = torch.linalg.eigh(moments.covariance(unbiased=unbiased))
    largest = values.abs().max()
    if values.min() < -1e-6 * largest:
        raise UserError(
            "moments hold a negative variance, so they are of no features; compute them anew from the clips"
        )
    # What is rounding in a singular covariance would count as its square root: 1e-16 as 1e-8, hundreds of times.
    least = len(values) * torch.finfo(torch.float64).eps * largest
    return _Spread(moments.mean, (vectors * values.where(values >= least, 0.0).sqrt()).T)


def _between(a: _Spread, b: _Spread) -> float:
    traces = (a.root.square().sum() + b.root.square().sum()).item()
    if not math.isfinite(traces):
        raise Failure("the Frechet distance is not finite: features are too large to be squared")
    # tr (Sa Sb)^(1/2) is the sum of the singular values of root_a root_b^T. The product of covariances, whose root is
    # the usual way, has lost half of the digits of all that is small.
    cross = torch.linalg.svdvals(a.root @ b.root.T).sum().item()
    value = (a.mean - b.mean).square().sum().item() + traces - 2.0 * cross
    if not value >= -1e-6 * traces:  # below that it is not rounding, and NaN is nothing at all
        raise Failure(f"the Frechet distance came out as {value:g}, which cannot be; look at the features")
    return max(value, 0.0)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """Sums over y (M, D) of the kernel for each row of x (N, D) -> (N,), never holding all N x M."""
    return torch.cat([(rows @ y.T / x.shape[1] + 1.0).pow(3).sum(1) for rows in x.split(_ROWS)])


def _self_similarity(x: Tensor, *, unbiased: bool) -> float:
    N, D = x.shape
    _divisor(N, unbiased=unbiased)
    total = _kernel(x, x).sum().item()
    if not unbiased:
        return total / N**2
    itself = (x.square().sum(1) / D + 1.0).pow(3).sum().item()
    return (total - itself) / (N * (N - 1))


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (D,), features less their mean (N, D)); of no features the mean is 0."""
    mean = features.sum(0) / max(len(features), 1)
    return mean, features - mean


def _divisor(n: int, *, unbiased: bool) -> int:
    if n < 2:
        raise UserError(f"a distance of distributions needs 2 clips or more on each side; there are {n}")
    return n - 1 if unbiased else n


def _same_width(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features are (N, D) and (M, D), not {tuple(x.shape)} and {tuple(y.shape)}")


def _checked(features: Tensor) -> Tensor:
    """In float64 on the CPU."""
    if features.ndim != 2:
        raise ValueError(f"features are (N, D), not {tuple(features.shape)}")
    if features.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"features are {features.dtype}; compute them in float32, and do not round them")
    features = features.detach().to("cpu", torch.float64)
    bad = (~features.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"features hold NaN or infinity in {len(bad)} of {len(features)} rows, the first of which is {bad[0]}; "
            "look at those clips, and at the weights that made the features"
        )
    return features
