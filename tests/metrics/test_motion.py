"""Motion by optical flow: synthetic clips in the right order, formulas on flows made by hand, what must not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdm.errors import UserError
from vdm.metrics.motion import (
    DynamicDegree,
    Flows,
    Smoothness,
    WarpingError,
    _warped,
    dynamic_degree,
    flicker,
    measure_flows,
    motion_smoothness,
    motion_smoothness_by_interpolation,
    warping_error,
)

SIDE, FRAMES = 128, 16


def texture(seed: int, height: int, width: int, *, sigma: float) -> np.ndarray:
    soft = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(height, width, 3)), (0, 0), sigma)
    return soft / soft.std()


def draw(x: float, pan: float) -> np.ndarray:
    """A textured square of 24 pixels, `x` from the left, before a wall that the camera has passed by `pan` pixels."""
    size = (SIDE, SIDE)
    wall = 120 + 18 * texture(0, SIDE, 2 * SIDE, sigma=4)
    frame = cv2.warpAffine(wall, np.array([[1.0, 0, -pan], [0, 1, 0]]), size)
    if x >= 0:
        place = np.array([[1.0, 0, x], [0, 1, 54]])
        colours = np.array([200, 60, 50]) + 20 * texture(1, 24, 24, sigma=2)
        share = cv2.warpAffine(np.ones((24, 24)), place, size)[..., None]
        frame += share * (cv2.warpAffine(colours, place, size, borderMode=cv2.BORDER_REPLICATE) - frame)
    return frame


def clip_of(x: np.ndarray | float = -1.0, pan: np.ndarray | float = 0.0, *, noise: float = 0.0) -> Tensor:
    time = np.zeros(FRAMES)
    frames = np.stack([draw(*at) for at in zip(x + time, pan + time, strict=True)])
    frames += noise * np.random.default_rng(2).normal(size=frames.shape)
    return torch.from_numpy(np.clip(np.rint(frames), 0, 255).astype(np.uint8))


def synthetic() -> dict[str, Tensor]:
    time, rng = np.arange(FRAMES), np.random.default_rng(2)
    ease = 20 + 30 * (1 - np.cos(np.pi * time / (FRAMES - 1)))
    jitter = ease + rng.uniform(-4, 4, FRAMES)
    return {
        "static": clip_of(50.0),
        "even": clip_of(30 + 3.0 * time),
        "ease": clip_of(ease),
        "jitter": clip_of(jitter),
        "shuffled": clip_of(ease)[torch.from_numpy(rng.permutation(FRAMES))],
        "doubled": clip_of(ease)[::2].repeat_interleave(2, dim=0),
        "noise": clip_of(50.0, noise=5.0),
        "pan": clip_of(pan=3.0 * time),
    }


@pytest.fixture(scope="module")
def clips() -> dict[str, Tensor]:
    return synthetic()


@pytest.fixture(scope="module")
def flows(clips: dict[str, Tensor]) -> dict[str, Flows]:
    return {name: measure_flows(clip) for name, clip in clips.items()}


class Measured(NamedTuple):
    smooth: Smoothness
    error: WarpingError
    degree: DynamicDegree


def measure(flows: Flows) -> Measured:
    return Measured(motion_smoothness(flows), warping_error(flows), dynamic_degree(flows, fps=8))


@pytest.fixture(scope="module")
def measured(flows: dict[str, Flows]) -> dict[str, Measured]:
    return {name: measure(one) for name, one in flows.items()}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = cv2.getNumThreads()
    yield cv2.setNumThreads
    cv2.setNumThreads(before)


# What each kind of motion scores. The clips are not those the numbers were first found with, so they are loose.
@pytest.mark.parametrize(
    ("name", "smooth", "interpolated", "margin"),
    [
        ("static", 1.0, 1.0, 0.0),
        ("even", 0.932, 0.9995, 0.02),
        ("ease", 0.848, 0.994, 0.02),
        ("jitter", 0.550, 0.994, 0.1),
        ("shuffled", 0.325, 0.990, 0.1),
        ("doubled", 0.099, 0.991, 0.12),
        ("noise", 0.266, 0.981, 0.05),
        ("pan", 0.997, 0.9985, 0.01),
    ],
)
def test_smoothness_of_known_motions(
    flows: dict[str, Flows],
    measured: dict[str, Measured],
    name: str,
    smooth: float,
    interpolated: float,
    margin: float,
) -> None:
    assert measured[name].smooth.value == pytest.approx(smooth, abs=margin)
    assert motion_smoothness_by_interpolation(flows[name]) == pytest.approx(interpolated, abs=min(margin, 0.005))


def test_the_order_of_known_motions(measured: dict[str, Measured]) -> None:
    order = ("static", "pan", "even", "ease", "jitter", "shuffled", "doubled")
    values = [measured[name].smooth.value for name in order]
    assert values == sorted(values, reverse=True)
    assert values[3] > values[4] + 0.2, "jitter is well apart from what is smooth"


def test_what_goes_beside_smoothness(clips: dict[str, Tensor], measured: dict[str, Measured]) -> None:
    static = {name: one.smooth.static for name, one in measured.items()}
    assert static["static"] == 1.0
    assert static["doubled"] == pytest.approx(8 / 15, abs=1 / 15 + 1e-9), "every second pair, and a slow one"
    assert static["even"] == static["pan"] == static["noise"] == 0.0
    moving = {name: one.degree for name, one in measured.items()}
    assert moving["static"] == (False, 0.0)
    assert not moving["noise"].dynamic and moving["noise"].mean < 0.5
    assert moving["pan"].dynamic and moving["pan"].mean == pytest.approx(3, abs=0.15)
    assert moving["ease"].dynamic and not moving["even"].dynamic, "for a moment it is fast"
    still = flicker(clips["static"][None]).item()
    assert still == 1.0 > flicker(clips["even"][None]).item() > flicker(clips["noise"][None]).item()


def test_warping_error_of_known_motions(measured: dict[str, Measured]) -> None:
    errors = {name: one.error for name, one in measured.items()}
    assert errors["static"] == (0.0, 1.0)
    mse = {name: error.mse for name, error in errors.items() if error.mse is not None}
    assert len(mse) == len(errors)
    assert mse["pan"] < 1e-5 and errors["pan"].coverage == pytest.approx(1 - 3 / SIDE, abs=0.02)
    assert mse["even"] < mse["shuffled"] and errors["even"].coverage > errors["shuffled"].coverage
    # The noise of both frames, the next one's smoothed by interpolation: between one and two variances.
    assert (5 / 255) ** 2 < mse["noise"] < 2 * (5 / 255) ** 2


@pytest.mark.parametrize("name", ["even", "ease", "pan"])
@pytest.mark.parametrize("dims", [[0], [2], [1]], ids=["reversed", "left-right", "up-down"])
def test_motion_has_no_direction(
    clips: dict[str, Tensor], measured: dict[str, Measured], name: str, dims: list[int]
) -> None:
    """DIS lays its patches from the top left, so that a mirrored clip has nearly the mirrored flow."""
    turned, straight = measure(measure_flows(clips[name].flip(dims))), measured[name]
    assert turned.smooth.value == pytest.approx(straight.smooth.value, abs=0.03)
    assert turned.error.coverage == pytest.approx(straight.error.coverage, abs=0.02)
    assert turned.degree.mean == pytest.approx(straight.degree.mean, abs=0.1)


# ---- flows ----


@pytest.mark.parametrize(("shift", "margin"), [(0.5, 0.06), (1.0, 0.03), (3.0, 0.03), (8.0, 0.06)])
def test_flow_of_a_shift(shift: float, margin: float) -> None:
    found = measure_flows(clip_of(pan=shift * np.arange(FRAMES))[:2])
    inner = (slice(None), slice(16, -16), slice(16, -16))
    for flow, x in ((found.forward, -shift), (found.backward, shift)):
        assert np.hypot(flow[inner][..., 0] - x, flow[inner][..., 1]).mean() < margin


def test_small_clips_are_measured_at_twice_their_size() -> None:
    large = clip_of(pan=2.0 * np.arange(FRAMES))
    for side, enlarged in ((64, 1), (63, 2), (32, 2), (16, 2)):
        clip = large[:6, :side, :side]
        found = measure_flows(clip)
        assert found.enlarged == enlarged
        assert found.frames.shape == (6, side * enlarged, side * enlarged, 3)
        assert dynamic_degree(found, fps=8).mean == pytest.approx(2.0, abs=0.6 if side == 16 else 0.2), side
    wide = measure_flows(large[:2, :32])
    assert wide.forward.shape == wide.backward.shape == (1, 64, 256, 2)


def test_the_same_bits_whatever_the_threads(clips: dict[str, Tensor], threads: Callable[[int], None]) -> None:
    both = []
    for count in (1, 2, 1):
        threads(count)
        found = measure_flows(clips["jitter"][:6])
        numbers = (motion_smoothness(found), warping_error(found), motion_smoothness_by_interpolation(found))
        both.append((found.forward.tobytes(), found.backward.tobytes(), numbers, dynamic_degree(found, fps=24)))
    assert both[0] == both[1] == both[2]


def test_clips_are_left_alone_and_flows_are_their_own(clips: dict[str, Tensor]) -> None:
    clip = clips["ease"][:4].clone()
    found, before = measure_flows(clip), clip.clone()
    first = motion_smoothness(found), warping_error(found), dynamic_degree(found, fps=30)
    assert torch.equal(clip, before)
    clip.zero_()
    assert (motion_smoothness(found), warping_error(found), dynamic_degree(found, fps=30)) == first
    other_memory = before.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert measure_flows(other_memory).forward.tobytes() == found.forward.tobytes()


def test_farneback_agrees(clips: dict[str, Tensor], measured: dict[str, Measured]) -> None:
    """Another method's flows tell the same story."""
    known = {"static": 1.0, "pan": 0.998, "even": 0.959, "ease": 0.856, "jitter": 0.393, "doubled": 0.065}
    smooth = []
    for name, value in known.items():
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clips[name].numpy()]
        flow = np.stack([farneback(a, b) for a, b in zip(grey, grey[1:], strict=False)])
        found = Flows(clips[name].numpy(), flow, -flow, 1)
        smooth.append(motion_smoothness(found).value)
        assert smooth[-1] == pytest.approx(value, abs=0.15), name
        if name not in ("jitter", "doubled"):  # where the methods see other things
            assert dynamic_degree(found, fps=8).mean == pytest.approx(measured[name].degree.mean, rel=0.2, abs=0.05)
    assert smooth == sorted(smooth, reverse=True)


def farneback(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return cv2.calcOpticalFlowFarneback(a, b, np.empty(0), 0.5, 3, 15, 3, 5, 1.2, 0)


# ---- formulas, on flows made by hand ----


def made(forward: np.ndarray, *, backward: np.ndarray | None = None, frames: np.ndarray | None = None) -> Flows:
    """Flows (T-1,H,W,2) of a clip that is grey unless given, and that go back as they came unless told otherwise."""
    T, H, W = len(forward) + 1, *forward.shape[1:3]
    frames = np.full((T, H, W, 3), 128, np.uint8) if frames is None else frames
    backward = -forward if backward is None else backward
    return Flows(frames, forward.astype(np.float32), backward.astype(np.float32), 1)


def constant(*vectors: tuple[float, float], side: int = 32) -> np.ndarray:
    return np.ones((len(vectors), side, side, 1)) * np.array(vectors)[:, None, None]


def test_smoothness_by_hand() -> None:
    assert motion_smoothness(made(constant((3, 4), (3, 4), (3, 4)))) == (1.0, 0.0)
    assert motion_smoothness(made(constant((0, 0), (0, 0)))) == (1.0, 1.0)
    # There and back: |a| = 10 at every point, |F_t| + |F_{t+1}| = 10.
    assert motion_smoothness(made(constant((3, 4), (-3, -4)))).value == pytest.approx(0.05 / 10.05)
    # At a right angle: |a| = sqrt(2); twice, and the second pair stands still.
    turned = motion_smoothness(made(constant((1, 0), (0, 1), (0, 0), (0, 0.04))))
    change, total = 2**0.5 + 1 + 0.04, 2 + 1 + 0.04 + 3 * 0.05
    assert turned == pytest.approx((1 - change / total, 0.5))


def test_a_point_is_followed() -> None:
    """The right half will speed up, and only what is about to enter it feels that."""
    then = np.zeros((1, 32, 32, 2))
    then[:, :, 16:, 0] = 2.0
    flows = made(np.concatenate([constant((2, 0)), then]))
    # Columns 0..13 come to rest, 14..31 go on at 2.
    change, total = 14 * 2, 32 * 2 + 18 * 2 + 32 * 0.05
    assert motion_smoothness(flows).value == pytest.approx(1 - change / total)


def test_warping_error_by_hand() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    frames[1, :, 4:] = frames[0, :, :16]
    assert warping_error(made(constant((4, 0), side=20), frames=frames)) == (0.0, 0.8)
    lost = made(constant((4, 0), side=20), backward=constant((4, 0), side=20))
    assert warping_error(lost) == (None, 0.0)
    nothing = made(constant((0, 0), side=20), frames=frames)
    squares = np.square(np.diff(frames.astype(float) / 255, axis=0))
    assert warping_error(nothing) == pytest.approx((squares.mean(), 1.0))
    # |F + B|^2 = 0.64 against 0.5 + 0.01 (|F|^2 + |B|^2): 0.545 and 0.97.
    for x, coverage in ((1.1, 0.0), (4.4, 0.8)):
        slightly_off = made(constant((x, 0), side=20), backward=constant((0.8 - x, 0), side=20))
        assert warping_error(slightly_off).coverage == coverage


def test_degree_by_hand() -> None:
    def degree(*speeds: float, share: float = 1.0, fps: float = 8.0) -> tuple[bool, float]:
        flow = constant(*[(speed, 0.0) for speed in speeds], side=64)
        flow[:, round(64 * share) :] = 0.0
        return dynamic_degree(made(flow), fps=fps)

    fast, slow = 1.6, 1.4  # the threshold at 64 pixels is 1.5
    assert degree(*[fast] * 4, *[slow] * 11) == (True, pytest.approx((4 * fast + 11 * slow) / 15))
    assert not degree(*[fast] * 3, *[slow] * 12)[0], "four pairs of 16 frames are asked for"
    assert degree(*[2.0] * 15, share=5 / 64) == (True, pytest.approx(2.0)), "the fastest twentieth counts"
    assert degree(*[2.0] * 15, share=1 / 64) == (False, pytest.approx(2.0 * 64 / 204))
    assert not degree(fast, *[slow] * 4)[0] and degree(fast, fast, *[slow] * 3)[0], (
        "two of 6 frames, not one of 5 pairs"
    )
    assert degree(fast)[0] and not degree(slow)[0], "of two frames at least one pair is asked for"


def test_degree_depends_on_the_frame_rate(flows: dict[str, Flows]) -> None:
    for fps, pace in ((1, 3), (8, 3), (11.9, 3), (16, 6), (24, 9)):  # at a border that much is new, and has any flow
        assert dynamic_degree(flows["pan"], fps=fps).mean == pytest.approx(pace, rel=0.15), fps
    assert dynamic_degree(flows["static"], fps=1e9) == (False, 0.0)


def test_flicker_by_hand() -> None:
    levels = torch.tensor([[0, 128, 255], [7, 7, 7], [0, 255, 0]], dtype=torch.uint8)
    clips = levels[:, :, None, None, None].expand(3, 3, 5, 4, 3)
    assert flicker(clips).tolist() == [0.5, 1.0, 0.0]


def test_warping_is_bilinear_and_stays_in_the_frame() -> None:
    rng = np.random.default_rng(0)
    image, flow = rng.normal(size=(9, 12, 4)), rng.normal(scale=4, size=(9, 12, 2))
    y, x = np.indices((9, 12))
    places = np.stack([(x + flow[..., 0]) / 11, (y + flow[..., 1]) / 8], -1) * 2 - 1
    grid, pixels = torch.from_numpy(places)[None], torch.from_numpy(image).permute(2, 0, 1)[None]
    expected = F.grid_sample(pixels, grid, padding_mode="border", align_corners=True)[0].permute(1, 2, 0)
    np.testing.assert_allclose(_warped(image, flow), expected.numpy(), rtol=0, atol=1e-12)
    assert np.array_equal(_warped(image, np.zeros((9, 12, 2))), image)


# ---- properties ----

random_clips = st.tuples(st.integers(0, 2**31), st.integers(1, 7), st.integers(2, 6), st.integers(1, 9))


@settings(max_examples=25, deadline=None)
@given(random_clips)
def test_properties_of_flicker(sizes: tuple[int, int, int, int]) -> None:
    seed, B, T, side = sizes
    clips = torch.randint(0, 256, (B, T, side, side + 1, 3), generator=torch.Generator().manual_seed(seed)).byte()
    value = flicker(clips)
    assert torch.equal(value, torch.cat([flicker(clip[None]) for clip in clips])), "a batch changes nothing"
    assert torch.equal(value, flicker(clips.flip(1))), "nor does the direction of time"
    assert torch.equal(value, flicker(clips.flip(3))), "nor a mirror"
    expected = 1 - np.abs(np.diff(clips.numpy().astype(float), axis=1)).mean((1, 2, 3, 4)) / 255
    np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 4), st.floats(0, 8))
def test_properties_of_metrics_of_flows(seed: int, pairs: int, speed: float) -> None:
    """Whatever the flows, the ranges hold, and a mirror, which turns flows over, changes nothing."""
    rng = np.random.default_rng(seed)
    flow, back = speed * rng.normal(size=(2, pairs, 16, 17, 2))
    frames = rng.integers(0, 256, (pairs + 1, 16, 17, 3), dtype=np.uint8)
    plain = made(flow, backward=back, frames=frames)
    mirrored = made(flow[:, :, ::-1] * (-1, 1), backward=back[:, :, ::-1] * (-1, 1), frames=frames[:, :, ::-1])
    smooth, error, degree = motion_smoothness(plain), warping_error(plain), dynamic_degree(plain, fps=8)
    assert 0 <= smooth.value <= 1 and 0 <= error.coverage <= 1 and degree.mean >= 0
    assert motion_smoothness(mirrored) == pytest.approx(smooth, abs=1e-9)
    assert dynamic_degree(mirrored, fps=8) == pytest.approx(degree, abs=1e-9)
    assert warping_error(mirrored) == pytest.approx(error, abs=1e-9)


# ---- what is refused ----


def test_what_cannot_be_measured_is_said(clips: dict[str, Tensor]) -> None:
    clip = clips["pan"]
    with pytest.raises(UserError, match="2 frames or more, not 1"):
        measure_flows(clip[:1])
    with pytest.raises(UserError, match="16 pixels a side or more, not 128x15"):
        measure_flows(clip[:, :15])
    with pytest.raises(UserError, match="2 frames or more, not 1"):
        flicker(clip[None, :1])
    for wrong in (clip.float(), clip[0], clip[..., :1]):
        with pytest.raises(ValueError, match="uint8"):
            measure_flows(wrong)
    two = measure_flows(clip[:2])
    for metric in (motion_smoothness, motion_smoothness_by_interpolation):
        with pytest.raises(UserError, match="3 frames or more"):
            metric(two)
    for fps in (0.0, -8.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="fps is"):
            dynamic_degree(two, fps=fps)
