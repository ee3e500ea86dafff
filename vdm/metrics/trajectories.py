"""Where things and hands are in a clip's frames, and what becomes of a thing: from labels of pixels to a few numbers.

Positions are fractions of the frame (x right, y down), areas fractions of its area, gaps fractions of its shorter side.
What is not seen is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from vdm.metrics.segmentation import HAND, NAMES, WHITE

LEAST_AREA = 0.003  # of the frame; a smaller patch is no thing
PIECE, NEAR = 0.15, 0.25  # pieces of a thing that fingers divide: so large beside its largest, and so near to it
RIM = 0.06  # of the shorter side: so far from a thing of a hue next to skin's, blur makes what looks like skin
TOUCH = 0.08  # a larger gap is none

SQUARE = np.ones((3, 3), np.uint8)
NEXT_TO_SKIN = np.isin(np.arange(256), [1 + NAMES.index("red"), 1 + NAMES.index("yellow")]).astype(np.uint8)


@dataclass(frozen=True)
class Track:
    """One colour's largest patch in every frame, with what belongs to it."""

    label: int
    masks: np.ndarray  # (T,H,W) bool
    area: np.ndarray  # (T,), 0 where unseen
    at: np.ndarray  # (T,2) its centre of mass

    @property
    def seen(self) -> np.ndarray:
        seen: np.ndarray = self.area > 0
        return seen


@dataclass(frozen=True)
class Grasp:
    """How the nearest hand is to a thing in every frame; NaN where either is unseen."""

    gap: np.ndarray  # (T,) from the thing's outline to the hand's
    beside: np.ndarray  # (T,2) from the thing's middle to the hand's


@dataclass(frozen=True)
class Motion:
    """What became of one thing from the first eighth of its frames to the last."""

    right: float
    up: float
    growth: float  # of its size, as a natural logarithm
    rise: float  # of its highest place over its first
    wander: float  # the larger side of the box that its middle stays in
    detours: tuple[float, float, float]  # how much of its way along x, y and in log size was there and back
    way_up_and_down: float  # all of it, along y
    contact: float  # share of the frames in which it moves (or of all, if it does not) that a hand touches it
    held: float  # share of all frames that a hand touches it
    hand_ahead: float  # of its middle, in the direction of `right`; negative: the hand is behind
    gone: bool  # for good, before the end
    first_gap: float  # between it and a hand when it was first seen; NaN without a hand
    top_gap: float  # ... when it was highest
    last_gap: float  # ... when it was last seen
    whitened: float  # share of its first place that is white at the end

    @property
    def activity(self) -> float:
        """What singles out the thing that is acted on: that it moves, goes, or else that it is held."""
        return self.wander + abs(self.growth) / 4 + 0.1 * self.held + self.gone


def follow(labels: np.ndarray, label: int) -> Track:
    """Find one colour in uint8 labels (T,H,W)."""
    frames, height, width = labels.shape
    masks, least = np.zeros(labels.shape, bool), LEAST_AREA * height * width
    area, at = np.zeros(frames), np.full((frames, 2), np.nan)
    for t, frame in enumerate(labels):
        part = _around((frame == label).view(np.uint8))
        mask = frame[part] == label
        if np.count_nonzero(mask) < least:
            continue
        # Closed first, so that a thin shadow across a thing does not break it.
        whole = cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_CLOSE, SQUARE)
        _, parts, stats, centres = cv2.connectedComponentsWithStats(whole)
        sizes = stats[:, cv2.CC_STAT_AREA]
        best = 1 + int(np.argmax(sizes[1:]))
        if sizes[best] < least:
            continue
        own = (sizes >= PIECE * sizes[best]) & (np.abs(centres - centres[best]).max(axis=1) < NEAR * min(height, width))
        own[0] = False
        masks[t][part] = mask & own[parts]
        area[t] = sizes[own].sum() / (height * width)
        middle = sizes[own] @ centres[own] / sizes[own].sum() + (part[1].start, part[0].start)
        at[t] = (middle + 0.5) / (width, height)
    return Track(label, masks, area, at)


def find_hands(labels: np.ndarray) -> np.ndarray:
    """Number the hands of each frame from 1 on, int32 (T,H,W); specks and rims of other things are none."""
    height, width = labels.shape[1:]
    hands, least = np.zeros(labels.shape, np.int32), LEAST_AREA * height * width
    square = np.ones((3, 3) if min(height, width) < 96 else (5, 5), np.uint8)
    around = np.ones((2 * round(RIM * min(height, width)) + 1,) * 2, np.uint8)
    for t, frame in enumerate(labels):
        part = _around((frame == HAND).view(np.uint8))
        mask = cv2.morphologyEx((frame[part] == HAND).view(np.uint8), cv2.MORPH_OPEN, square)
        number, parts = cv2.connectedComponents(mask)
        rims = cv2.dilate(cv2.LUT(frame, NEXT_TO_SKIN), around)[part]
        sizes = np.bincount(parts[rims == 0], minlength=number)
        numbers = np.where(sizes >= least, np.arange(number), 0).astype(np.int32)
        numbers[0] = 0
        hands[t][part] = numbers[parts]
    return hands


def grasp(track: Track, hands: np.ndarray) -> Grasp:
    """Which of the hands, int32 (T,H,W), is nearest to a thing, and where."""
    frames, height, width = hands.shape
    gap, beside = np.full(frames, np.nan), np.full((frames, 2), np.nan)
    for t in np.flatnonzero(track.seen & hands.any(axis=(1, 2))):
        part = _around((track.masks[t] | (hands[t] > 0)).view(np.uint8))
        away = cv2.distanceTransform((~track.masks[t][part]).view(np.uint8), cv2.DIST_L2, 3)
        rows, columns = np.nonzero(hands[t][part])
        nearest = int(np.argmin(away[rows, columns]))
        numbers = hands[t][part][rows, columns]
        own = numbers == numbers[nearest]
        gap[t] = (away[rows[nearest], columns[nearest]] - 1) / min(height, width)
        middle = columns[own].mean() + part[1].start, rows[own].mean() + part[0].start
        beside[t] = (np.array(middle) + 0.5) / (width, height)
    return Grasp(gap, beside - track.at)


def _around(mask: np.ndarray) -> tuple[slice, slice]:
    """Where the pixels of a mask, uint8 (H,W), are, and two more on every side: the rest need not be looked at."""
    x, y, width, height = cv2.boundingRect(mask)
    return np.s_[max(0, y - 2) : y + height + 2, max(0, x - 2) : x + width + 2]


def eighth(frames: int) -> int:
    """How many frames count as the start, and as the end, of a clip."""
    return max(1, frames // 8)


def measure(track: Track, grasp: Grasp, labels: np.ndarray) -> Motion:
    """The motion of a thing that is seen in at least one frame."""
    frames, seen, k = len(labels), np.flatnonzero(track.seen), eighth(len(labels))
    raw = np.column_stack([track.at[seen], np.log(track.area[seen]) / 2])
    path = _smooth(raw)
    first, last = np.median(raw[:k], axis=0), np.median(raw[-k:], axis=0)
    ways = np.abs(np.diff(path, axis=0)).sum(axis=0)
    net = last - first
    gone = seen[-1] < frames - k and len(seen) == seen[-1] - seen[0] + 1  # and it did not come and go before
    gaps = grasp.gap[seen]
    moving = _moving(raw[:, :2])
    sides = grasp.beside[seen, 0][moving]
    ahead = float(np.median(sides[~np.isnan(sides)])) if (~np.isnan(sides)).any() else 0.0
    place = track.masks[seen[:k]].mean(axis=0) > 0.5
    return Motion(
        right=float(net[0]),
        up=float(-net[1]),
        growth=float(net[2]),
        rise=float(first[1] - path[:, 1].min()),
        wander=float(np.ptp(path[:, :2], axis=0).max()),
        detours=tuple((ways - np.abs(net)).tolist()),
        way_up_and_down=float(ways[1]),
        contact=float(np.mean(gaps[moving] < TOUCH)),
        held=float(np.mean(gaps < TOUCH)),
        hand_ahead=float(np.sign(net[0]) * ahead),
        gone=bool(gone),
        first_gap=_least(gaps[:k]),
        top_gap=float(gaps[np.argmin(raw[:, 1])]),
        last_gap=_least(gaps[-k:]),
        whitened=float((labels[-k:, place] == WHITE).mean()) if place.any() else 0.0,
    )


def _least(values: np.ndarray) -> float:
    """NaN where there is none."""
    return float(np.fmin.reduce(values))


def _smooth(path: np.ndarray) -> np.ndarray:
    """The median of every three points in turn, (N,D); the ends stay."""
    if len(path) < 3:
        return path
    inner = np.median(np.stack([path[:-2], path[1:-1], path[2:]]), axis=0)
    return np.concatenate([path[:1], inner, path[-1:]])


def _moving(at: np.ndarray) -> np.ndarray:
    """(N,2) to the frames into which it moved, (N,) bool; all of them where it hardly ever did."""
    speed = np.abs(np.diff(at, axis=0, prepend=at[:1])).sum(axis=1)
    moving: np.ndarray = speed > max(0.006, 0.25 * speed.max())
    return moving if moving.any() else np.ones(len(at), bool)
