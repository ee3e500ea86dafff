"""Distances of features against formulas, scipy, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdm.errors import Failure, UserError
from vdm.metrics.frechet import (
    Moments,
    enough_clips,
    frechet_distance,
    frechet_from_moments,
    frechet_infinity,
    kernel_distance,
)

Distance = Callable[..., float]


def from_moments(x: Tensor, y: Tensor, *, unbiased: bool = True) -> float:
    return frechet_from_moments(Moments.of(x), Moments.of(y), unbiased=unbiased)


BOTH_ROUTES = pytest.mark.parametrize("distance", [frechet_distance, from_moments])
ALL_DISTANCES = pytest.mark.parametrize("distance", [frechet_distance, from_moments, kernel_distance])
SEEDS = st.integers(0, 2**31)
SQUARE = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def gaussian(covariance: Tensor, mean: Tensor, *, n: int, seed: int = 0) -> Tensor:
    """Features (n, D) whose mean and unbiased covariance are exactly these."""
    centred = normal(n, len(mean), seed=seed)
    centred = centred - centred.mean(0)
    white = torch.linalg.qr(centred).Q * math.sqrt(n - 1)
    values, vectors = torch.linalg.eigh(covariance)
    return white @ (vectors * values.clamp(min=0).sqrt()).T + mean


def waves(n: int = 50) -> tuple[Tensor, Tensor]:
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64)
    return torch.sin(i * (j + 1) + 1), 1.2 * torch.cos(0.7 * i * (j + 2)) + 0.1 * j


def clouds(seed: int, *, n: int, m: int, D: int) -> tuple[Tensor, Tensor]:
    """Two sets with covariances that do not commute, of very unequal eigenvalues, away from 0."""
    scales = torch.logspace(0, -3, D, dtype=torch.float64)
    x = normal(n, D, seed=seed) * scales @ normal(D, D, seed=seed + 1) + 3.0
    return x, normal(m, D, seed=seed + 2) @ normal(D, D, seed=seed + 3) * scales


GAUSSIANS = {
    "that do not commute": ([[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 3.0]], [0.0, 0.0], 8 - 2 * math.sqrt(14)),
    "with a shift": (np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0]), [1.0, 2.0, 2.0], 14.0),
    "that are flat": (np.diag([1.0, 0.0]), np.diag([0.0, 1.0]), [0.0, 0.0], 2.0),
    "of 400 features": (np.eye(400), 4 * np.eye(400), [0.1] * 400, 404.0),
    "that are points": (np.zeros((2, 2)), np.zeros((2, 2)), [3.0, 4.0], 25.0),
}


@BOTH_ROUTES
@pytest.mark.parametrize("which", GAUSSIANS)
def test_of_gaussians(distance: Distance, which: str) -> None:
    first, second, shift, expected = GAUSSIANS[which]
    mean = torch.tensor(shift, dtype=torch.float64)
    x = gaussian(torch.as_tensor(first, dtype=torch.float64), torch.zeros_like(mean), n=2 * len(mean) + 3)
    y = gaussian(torch.as_tensor(second, dtype=torch.float64), mean, n=2 * len(mean) + 8, seed=1)
    assert distance(x, y) == pytest.approx(expected, rel=1e-7)
    assert distance(y, x) == pytest.approx(expected, rel=1e-7)


def test_of_moments_alone() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    a = Moments(11, zero, 10 * torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    b = Moments(5, zero, 4 * torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)))
    assert frechet_from_moments(a, b) == pytest.approx(0.5166852265, abs=1e-10)


@BOTH_ROUTES
def test_of_four_points(distance: Distance) -> None:
    assert distance(SQUARE, SQUARE + torch.tensor([3.0, 4.0])) == pytest.approx(25, abs=1e-12)
    assert distance(SQUARE, 2 * SQUARE) == pytest.approx(14 / 3, abs=1e-12)
    assert distance(SQUARE, 2 * SQUARE, unbiased=False) == pytest.approx(4, abs=1e-12)


@BOTH_ROUTES
def test_of_waves(distance: Distance) -> None:
    assert distance(*waves()) == pytest.approx(5.483886118638, abs=1e-11)
    assert distance(*waves(5)) == pytest.approx(6.163252724, abs=1e-9), "fewer clips than features"


@BOTH_ROUTES
@pytest.mark.parametrize("n", [2, 30, 64, 65, 200])
def test_a_set_is_at_no_distance_from_itself(distance: Distance, n: int) -> None:
    x, _ = clouds(0, n=n, m=2, D=64)
    assert 0.0 <= distance(x, x) < 1e-9
    # Where 0 would hide what is clamped: rounding that counts as its square root is seen.
    assert distance(x, x + 1.0) == pytest.approx(64.0, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(32, 192), (192, 32), (32, 32), (192, 192)])
def test_moments_are_as_good_as_features(n: int, m: int) -> None:
    """Where one covariance is singular and the other is not, what is left over of the first would be multiplied."""
    x, y = clouds(0, n=n, m=m, D=64)
    assert from_moments(x, y) == pytest.approx(frechet_distance(x, y), abs=1e-9)


def test_kernel_distance_by_hand() -> None:
    x = torch.eye(2)
    assert kernel_distance(x, 2 * x) == pytest.approx(-7.0, abs=1e-14)
    assert kernel_distance(x, 2 * x, unbiased=False) == pytest.approx(7.1875, abs=1e-14)
    assert kernel_distance(*waves()) == pytest.approx(2.505366999366, abs=1e-11)


def test_kernel_distance_of_more_rows_than_are_held_at_a_time() -> None:
    x, y = normal(1500, 3, seed=0), normal(1100, 3, seed=1) + 0.5
    kernel = [(a @ b.T / 3 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in kernel[:2]]
    expected = (sum(within) - 2 * kernel[2].mean()).item()
    assert kernel_distance(x, y) == pytest.approx(expected, abs=1e-12)


def test_bias_falls_with_clips_for_frechet_alone() -> None:
    """Sets of one distribution, identity covariance, 400 features: METRICS' table has 158 and 79.5."""
    x, y = normal(1024, 400, seed=0), normal(1024, 400, seed=1)
    assert frechet_distance(x[:512], y[:512]) == pytest.approx(158, rel=0.03)
    assert frechet_distance(x, y) == pytest.approx(79.5, rel=0.03)
    assert abs(kernel_distance(x[:512], y[:512])) < 5e-3
    assert kernel_distance(x, y + 0.1) == pytest.approx(0.0305, abs=3e-3)


# Endless sets


@pytest.mark.parametrize("num_reference", [600, 6000])
def test_for_endless_sets_the_bias_is_gone(num_reference: int) -> None:
    """Of N(0, I) and N(0.25, I) with 16 features the distance is 1, and of 600 clips a good deal more."""
    finite, endless = [], []
    for seed in range(4):
        x, y = normal(600, 16, seed=seed) + 0.25, normal(num_reference, 16, seed=100 + seed)
        finite.append(frechet_distance(x, y))
        endless.append(frechet_infinity(x, y, seed=0, num_shuffles=2))
    assert np.mean(finite) - 1 > 0.1
    assert abs(np.mean(endless) - 1) < 0.5 * (np.mean(finite) - 1)


def test_of_what_does_not_depend_on_n_the_line_is_level() -> None:
    point, y = torch.zeros(300, 1), torch.linspace(-1, 1, 40)[:, None]
    variance = y.double().var(correction=0).item()
    assert frechet_infinity(point, y, seed=0, unbiased=False) == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize(("N", "D", "least"), [(400, 4, 100), (60, 16, 32)])
def test_the_line_is_fitted_to_means_of_subsets(N: int, D: int, least: int) -> None:
    x, y = normal(N, D, seed=0), normal(N, D, seed=1)
    sizes, draws = np.linspace(least, N, 15).round(), seeded(3)

    def distance(n: int) -> float:
        a, b = (torch.randperm(N, generator=draws)[:n] for _ in range(2))
        return frechet_distance(x[a], y[b])

    means = [np.mean([distance(int(n)) for _ in range(2)]) for n in sizes]
    height = np.polyfit(1 / sizes, means, 1)[1]
    assert frechet_infinity(x, y, seed=3, num_shuffles=2) == pytest.approx(height, abs=1e-9)


def test_endless_sets_by_seed() -> None:
    x, y = normal(60, 4, seed=0), normal(60, 4, seed=1)
    assert frechet_infinity(x, y, seed=0) == frechet_infinity(x, y, seed=0) != frechet_infinity(x, y, seed=1)
    with pytest.raises(UserError, match="needs 12 generated clips or more; there are 11"):
        frechet_infinity(x[:11], y, seed=0)


# What must not matter


@given(SEEDS, st.integers(2, 20), st.integers(2, 20), st.integers(1, 8))
def test_order_rotation_and_place_do_not_matter(seed: int, n: int, m: int, D: int) -> None:
    x, y = clouds(seed, n=n, m=m, D=D)
    expected = frechet_distance(x, y)
    close = {"rel": 1e-9, "abs": 1e-9}
    turn = torch.linalg.qr(normal(D, D, seed=seed)).Q
    assert frechet_distance(x[torch.randperm(n, generator=seeded(seed))], y) == pytest.approx(expected, **close)
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(expected, **close)
    assert frechet_distance(x + 7.0, y + 7.0) == pytest.approx(expected, **close)
    assert frechet_distance(y, x) == pytest.approx(expected, **close)
    assert frechet_distance(x * 3.0, y * 3.0) == pytest.approx(9.0 * expected, **close)
    assert expected >= (x.mean(0) - y.mean(0)).square().sum().item() * (1 - 1e-12) - 1e-9
    assert from_moments(x, y) == pytest.approx(expected, **close)


@given(SEEDS, st.integers(2, 20), st.integers(2, 20), st.integers(1, 8))
def test_order_and_rotation_do_not_matter_to_the_kernel(seed: int, n: int, m: int, D: int) -> None:
    x, y = clouds(seed, n=n, m=m, D=D)
    scale = max(x.square().sum(1).max().item(), y.square().sum(1).max().item(), 1.0) ** 3
    turn = torch.linalg.qr(normal(D, D, seed=seed)).Q
    for a, b in ((x.flip(0), y.flip(0)), (x @ turn, y @ turn), (y, x)):
        assert kernel_distance(a, b) == pytest.approx(kernel_distance(x, y), abs=1e-12 * scale)


@ALL_DISTANCES
def test_inputs_are_not_changed_and_float32_will_do(distance: Distance) -> None:
    x, y = (side.float() for side in waves())
    kept = x.clone(), y.clone()
    assert distance(x, y) == distance(x, y) == distance(x.double(), y.double())
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])


def test_streaming_far_from_zero() -> None:
    x = normal(1000, 16, seed=0) + 1e5
    merged = Moments.of(x[:0])
    for rank in range(4):
        mine = Moments.of(x[:0])
        for batch in x[rank::4].split(37):
            mine = mine.merge(Moments.of(batch))
        merged = merged.merge(mine)
    assert merged.n == 1000
    assert np.abs(merged.covariance().numpy() - np.cov(x.numpy().T)).max() < 1e-10
    biased = np.cov(x.numpy().T, bias=True)
    assert np.abs(merged.covariance(unbiased=False).numpy() - biased).max() < 1e-10
    np.testing.assert_allclose(merged.mean.numpy(), x.numpy().mean(0), rtol=1e-14)


@settings(max_examples=40)
@given(SEEDS, st.lists(st.integers(0, 6), min_size=3, max_size=3))
def test_moments_merge_in_any_order(seed: int, sizes: list[int]) -> None:
    x = normal(sum(sizes), 3, seed=seed) * 10 + 100
    a, b, c = map(Moments.of, x.split(sizes))
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert merged.n == sum(sizes)
        torch.testing.assert_close(merged.mean, Moments.of(x).mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(merged.m2, Moments.of(x).m2, rtol=1e-11, atol=1e-9)


# What is refused


@ALL_DISTANCES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_feature_that_is_no_number_is_refused(distance: Distance, bad: float) -> None:
    x, y = waves()
    x[7, 3] = bad
    for sides in ((x, y), (y, x)):
        with pytest.raises(UserError, match="NaN or infinity in 1 of 50 rows, the first of which is 7"):
            distance(*sides)


@ALL_DISTANCES
def test_what_programmers_get_wrong(distance: Distance) -> None:
    x, y = waves()
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        with pytest.raises(ValueError, match="compute them in float32"):
            distance(x.to(dtype), y.to(dtype))
    with pytest.raises(ValueError, match="features"):
        distance(x, y[:, :3])
    with pytest.raises(ValueError, match="features"):
        distance(x[0], y[0])
    for sides in ((x[:1], y), (x, y[:0])):
        with pytest.raises(UserError, match="needs 2 clips or more"):
            distance(*sides)


def test_moments_that_cannot_be() -> None:
    moments = Moments.of(SQUARE)
    with pytest.raises(ValueError, match="cannot be merged"):
        moments.merge(Moments.of(SQUARE[:, :1]))
    with pytest.raises(ValueError, match="have no distance"):
        frechet_from_moments(moments, Moments.of(SQUARE[:, :1]))
    with pytest.raises(ValueError, match="mean is"):
        Moments(4, moments.mean, moments.m2[0])
    with pytest.raises(ValueError, match="float64"):
        Moments(4, moments.mean.float(), moments.m2)
    with pytest.raises(UserError, match="NaN"):
        Moments(4, moments.mean * math.nan, moments.m2)


def test_a_distance_that_cannot_be_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    svdvals = torch.linalg.svdvals
    for factor in (1.01, math.nan):
        monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix, factor=factor: svdvals(matrix) * factor)
        for distance in (frechet_distance, from_moments):
            with pytest.raises(Failure, match="came out as (-0.0|nan)"):
                distance(SQUARE, SQUARE)
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: svdvals(matrix) * (1 + 1e-9))
    assert frechet_distance(SQUARE, SQUARE) == 0.0, "what rounding may do"


@ALL_DISTANCES
def test_features_too_large_for_float64_are_not_finite(distance: Distance) -> None:
    with pytest.raises((Failure, UserError), match="not finite|moments hold NaN"):
        distance(*(side * 1e160 for side in waves()))


def test_a_negative_variance_is_no_variance() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    impossible = Moments(2, zero, torch.diag(torch.tensor([-5.0, 1.0], dtype=torch.float64)))
    with pytest.raises(UserError, match="negative variance"):
        frechet_from_moments(impossible, Moments.of(SQUARE))


def test_how_many_clips_are_enough() -> None:
    assert enough_clips(400, 2048, num_features=400)
    assert not enough_clips(2048, 399, num_features=400)


# Against scipy


@pytest.mark.parity
@pytest.mark.parametrize(("n", "m", "D"), [(50, 40, 8), (300, 200, 64), (30, 500, 48), (500, 30, 48), (40, 30, 64)])
def test_square_root_by_scipy(n: int, m: int, D: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    x, y = clouds(3, n=n, m=m, D=D)
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    apart = np.square(x.numpy().mean(0) - y.numpy().mean(0)).sum()
    expected = apart + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    tolerance = 1e-9 if min(n, m) > D else 1e-5  # scipy's root of a singular matrix is the one that rounds
    assert frechet_distance(x, y) == pytest.approx(expected, rel=tolerance)
    assert from_moments(x, y) == pytest.approx(expected, rel=tolerance)
