"""How a clip moves, by optical flow that needs no weights: smoothness, flicker, warping error, degree of motion.

Flow is DIS (Kroeger et al. 2016), on the CPU. `measure_flows` finds it once for a clip, and the metrics share it. A
still is perfectly smooth and consistent, so none of these means much without the degree of motion beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from vdm.errors import UserError
from vdm.metrics.similarity import require_clips

LEAST_SIDE = 16  # pixels; DIS has no pyramid for less, and OpenCV's ends the process there
FULL_SIDE = 64  # pixels; smaller clips are measured at twice their size, for DIS stops at half of it
STILL = 0.05  # pixels of flow a frame: what DIS finds where nothing moves stays below
REFERENCE_FPS, REFERENCE_FRAMES, REFERENCE_SIDE = 8.0, 16, 256  # VBench's, for its dynamic degree


@dataclass(frozen=True, eq=False)
class Flows:
    """A clip and where its pixels go, all in pixels of `frames`: those of the clip, or twice as many if it is small.

    forward[t] leads from frame t to t+1, backward[t] from t+1 to t: what is at x here is at x + flow there.
    """

    frames: np.ndarray  # uint8 (T,H,W,3)
    forward: np.ndarray  # float32 (T-1,H,W,2), x then y
    backward: np.ndarray  # float32 (T-1,H,W,2)
    enlarged: int  # 1, or 2 where `frames` are the clip at twice its size


class Smoothness(NamedTuple):
    """`value` in [0, 1], and the share of pairs of frames between which next to nothing moves: these are smooth too."""

    value: float
    static: float


class WarpingError(NamedTuple):
    """Mean squared error of pixels in [0, 1], None where none has a counterpart; and the share that has one."""

    mse: float | None
    coverage: float


class DynamicDegree(NamedTuple):
    """Whether a clip moves much, and the speed behind that: pixels of the clip in about an eighth of a second, or
    from each frame to the next where that is longer."""

    dynamic: bool
    mean: float


def measure_flows(clip: Tensor) -> Flows:
    """The flows of a clip, uint8 (T,H,W,3) RGB: DIS, preset medium, on grey frames.

    Raises UserError for a clip of one frame, or under 16 pixels a side; ValueError for other shapes and dtypes.
    """
    require_clips(clip[None], least=2, asked_by="optical flow")
    H, W = clip.shape[1:3]
    if min(H, W) < LEAST_SIDE:
        raise UserError(
            f"optical flow needs frames of {LEAST_SIDE} pixels a side or more, not {W}x{H}; make them larger"
        )
    enlarged = 2 if min(H, W) < FULL_SIDE else 1
    frames = clip.cpu().numpy().copy()  # the flows are those of the clip as it is now
    if enlarged > 1:
        frames = np.stack([cv2.resize(frame, (2 * W, 2 * H), interpolation=cv2.INTER_LINEAR) for frame in frames])
    return Flows(frames, *_both_ways(frames), enlarged)


def flicker(clips: Tensor) -> Tensor:
    """1 - mean absolute difference of consecutive frames in [0, 1], uint8 (B,T,H,W,3) -> float64 (B,).

    VBench's temporal flickering, which is meant for prompts of scenes that stand still: motion lowers it too. Raises
    UserError for clips of one frame, ValueError for other shapes and dtypes.
    """
    require_clips(clips, least=2, asked_by="temporal flicker")
    differences = clips.to(torch.int16).diff(dim=1).abs()
    # Whole numbers have an exact sum, so that neither batch nor direction can change it.
    return 1.0 - differences.flatten(1).sum(1).double() / (255.0 * differences[0].numel())


def motion_smoothness(flows: Flows) -> Smoothness:
    """How little the flow of what moves changes from frame to frame (`ms_flow`): 1 is uniform motion, or none.

    With the acceleration a_t(x) = F_{t+1}(x + F_t(x)) - F_t(x) that a moving point feels, it is
    1 - sum |a_t| / (sum (|F_t| + |F_{t+1}(x + F_t(x))|) + 0.05 pixels everywhere). Raises UserError for two frames.
    """
    if len(flows.forward) < 2:
        raise UserError("motion smoothness needs clips of 3 frames or more; give longer ones")
    change = total = 0.0
    for now, then in zip(flows.forward, flows.forward[1:], strict=False):
        after = _warped(then, now)
        change += _lengths(after - now).sum()
        total += _lengths(now).sum() + _lengths(after).sum() + STILL * now[..., 0].size
    still = [bool(_lengths(flow).mean() < STILL) for flow in flows.forward]
    return Smoothness(float(1.0 - change / total), float(np.mean(still)))


def motion_smoothness_by_interpolation(flows: Flows) -> float:
    """1 - mean absolute error, in [0, 1], of odd frames made anew from their neighbours (`ms_vfi_dis`).

    VBench's motion smoothness with DIS for its network: the flows between the neighbours, taken as straight lines
    (Jiang et al. 2018, eq. 4 at t = 1/2), lead to the mean of both warped frames. Not comparable with VBench's own
    numbers, and close to 1 even for shuffled frames. Raises UserError for two frames.
    """
    if len(flows.frames) < 3:
        raise UserError("motion smoothness needs clips of 3 frames or more; give longer ones")
    ends = flows.frames[::2].astype(np.float64)
    middles = flows.frames[1::2][: len(ends) - 1]  # the last frame of an even number has no right neighbour
    errors = []
    for i, (there, back) in enumerate(zip(*_both_ways(flows.frames[::2]), strict=True)):
        offset = 0.25 * (back.astype(np.float64) - there)  # from the middle to the frame before; to the one after: less
        middle = (_warped(ends[i], offset) + _warped(ends[i + 1], -offset)) / 2.0
        errors.append(np.abs(middle - middles[i]).mean())
    return float(1.0 - np.mean(errors) / 255.0)


def warping_error(flows: Flows) -> WarpingError:
    """How far each frame differs from the next one brought back along the flow, where the flow can be trusted.

    That is where x + F(x) is in the frame and F and the flow B back from there cancel: |F + B|^2 <= 0.01 (|F|^2 +
    |B|^2) + 0.5 (Sundaram et al. 2010, eq. 5). All pixels of the clip count alike.
    """
    error = trusted = 0.0
    for i, (there, back) in enumerate(zip(flows.forward, flows.backward, strict=True)):
        back = _warped(back, there)
        bound = 0.01 * (np.square(there).sum(-1) + np.square(back).sum(-1)) + 0.5
        mask = (np.square(there + back).sum(-1) <= bound) & _inside(there)
        moved = _warped(flows.frames[i + 1].astype(np.float64), there)
        squares = np.square((moved - flows.frames[i]) / 255.0).mean(-1)
        error += squares[mask].sum()
        trusted += mask.sum()
    coverage = trusted / flows.forward[..., 0].size
    return WarpingError(float(error / trusted) if trusted else None, float(coverage))


def dynamic_degree(flows: Flows, *, fps: float) -> DynamicDegree:
    """Whether anything moves fast (`dd_dis`), after VBench with DIS for its network; `fps` is the clip's frame rate.

    Of frames about an eighth of a second apart, the mean length of the longest 5 % of each flow is a pair's speed; a
    clip is dynamic where at least a quarter as many pairs as frames are faster than 6 pixels at 256 a side (one at
    least, where VBench asks for none of two frames). Raises UserError for a frame rate that is not positive.
    """
    if not 0.0 < fps < np.inf:
        raise UserError(f"fps is {fps}; it must be positive, such as 8")
    interval = min(max(1, round(fps / REFERENCE_FPS)), len(flows.forward))
    frames, forward = flows.frames[::interval], flows.forward
    if interval > 1:
        forward, _ = _both_ways(frames)
    speeds = np.array([_fastest(_lengths(flow)) for flow in forward])
    threshold = 6.0 * min(frames.shape[1:3]) / REFERENCE_SIDE
    enough = max(1, round(4 * len(frames) / REFERENCE_FRAMES))
    return DynamicDegree(bool((speeds > threshold).sum() >= enough), float(speeds.mean() / flows.enlarged))


def _both_ways(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flows of frames uint8 (T,H,W,3) to the next ones and back, each float32 (T-1,H,W,2)."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(1)
    dis.setPatchSize(8)
    dis.setPatchStride(3)
    found = np.zeros((2, len(grey) - 1, *grey[0].shape, 2), dtype=np.float32)
    for i, (a, b) in enumerate(zip(grey, grey[1:], strict=False)):
        dis.calc(a, b, found[0, i])  # what is there is written over, never begun from
        dis.calc(b, a, found[1, i])
    return found[0], found[1]


def _lengths(flow: np.ndarray) -> np.ndarray:
    """(H,W,2) -> float64 (H,W)."""
    return np.hypot(flow[..., 0], flow[..., 1], dtype=np.float64)


def _fastest(lengths: np.ndarray) -> float:
    """The mean of the longest 5 %."""
    count = int(0.05 * lengths.size)
    return float(np.sort(lengths, axis=None)[-count:].mean())


def _targets(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a flow (H,W,2) leads to: x and y, each float64 (H,W)."""
    H, W = flow.shape[:2]
    return np.arange(W) + flow[..., 0].astype(np.float64), np.arange(H)[:, None] + flow[..., 1].astype(np.float64)


def _inside(flow: np.ndarray) -> np.ndarray:
    """Where a flow leads to a place within the frame, (H,W) bool; pixels are squares around whole numbers."""
    x, y = _targets(flow)
    return (x >= -0.5) & (x < flow.shape[1] - 0.5) & (y >= -0.5) & (y < flow.shape[0] - 0.5)


def _warped(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """image (H,W,C) at x + flow(x), float64: bilinear, and beyond the border what is at the border.

    Not cv2.remap, which may round places to 1/32 of a pixel: too coarse for an acceleration.
    """
    H, W = flow.shape[:2]
    x, y = _targets(flow)
    x, y = x.clip(0, W - 1), y.clip(0, H - 1)
    left, top = np.minimum(x.astype(np.intp), W - 2), np.minimum(y.astype(np.intp), H - 2)
    right, down = (x - left)[..., None], (y - top)[..., None]
    pixels, start = image.reshape(H * W, -1), top * W + left
    upper = pixels[start] * (1.0 - right) + pixels[start + 1] * right
    lower = pixels[start + W] * (1.0 - right) + pixels[start + W + 1] * right
    return upper * (1.0 - down) + lower * down
