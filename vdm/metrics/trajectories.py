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
TOUCH = 0.05  # a larger gap is none

NEXT_TO_SKIN = [1 + NAMES.index("red"), 1 + NAMES.index("yellow")]


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
    released: bool  # no hand at it at the end
    gone: bool  # for good, before the end
    last_gap: float  # between it and a hand when it was last seen
    whitened: float  # share of its first place that is white at the end

    @property
    def activity(self) -> float:
        """What singles out the thing that is acted on: that it moves, goes, or else that it is held."""
        return self.wander + abs(self.growth) / 4 + 0.1 * self.held + self.gone


def follow(labels: np.ndarray, label: int) -> Track:
    """Find one colour in uint8 labels (T,H,W)."""
    frames, height, width = labels.shape
    masks, least = labels == label, LEAST_AREA * height * width
    area, at = np.zeros(frames), np.full((frames, 2), np.nan)
    for t, pixels in enumerate(np.count_nonzero(masks, axis=(1, 2))):
        largest = 0
        if pixels >= least:
            # Closed first, so that a thin shadow across a thing does not break it.
            whole = cv2.morphologyEx(masks[t].astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
            _, parts, stats, centres = cv2.connectedComponentsWithStats(whole)
            best = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
            largest = stats[best, cv2.CC_STAT_AREA]
        if largest < least:
            masks[t] = False
            continue
        own = stats[:, cv2.CC_STAT_AREA] >= PIECE * largest
        own[0] = False
        own &= np.abs(centres - centres[best]).max(axis=1) < NEAR * min(height, width)
        masks[t] &= own[parts]
        sizes = stats[own, cv2.CC_STAT_AREA]
        area[t] = sizes.sum() / (height * width)
        at[t] = (sizes @ centres[own] / sizes.sum() + 0.5) / (width, height)
    return Track(label, masks, area, at)


def find_hands(labels: np.ndarray) -> np.ndarray:
    """Number the hands of each frame from 1 on, int32 (T,H,W); specks and thin rims of other things are none."""
    frames, height, width = labels.shape
    side = 3 if min(height, width) < 96 else 5
    around = np.ones((2 * round(RIM * min(height, width)) + 1,) * 2, np.uint8)
    hands, least = np.zeros(labels.shape, np.int32), LEAST_AREA * height * width
    for t in range(frames):
        mask = cv2.morphologyEx((labels[t] == HAND).astype(np.uint8), cv2.MORPH_OPEN, np.ones((side, side), np.uint8))
        number, parts = cv2.connectedComponents(mask)
        rim = cv2.dilate(np.isin(labels[t], NEXT_TO_SKIN).astype(np.uint8), around)
        sizes = np.bincount(parts[rim == 0], minlength=number)
        numbers = np.where(sizes >= least, np.arange(number), 0).astype(np.int32)
        numbers[0] = 0
        hands[t] = numbers[parts]
    return hands


def grasp(track: Track, hands: np.ndarray) -> Grasp:
    """Which of the hands, int32 (T,H,W), is nearest to a thing, and where."""
    frames, height, width = hands.shape
    gap, beside = np.full(frames, np.nan), np.full((frames, 2), np.nan)
    for t in np.flatnonzero(track.seen):
        rows, columns = np.nonzero(hands[t])
        if not len(rows):
            continue
        away = cv2.distanceTransform(1 - track.masks[t].astype(np.uint8), cv2.DIST_L2, 3)[rows, columns]
        nearest = int(np.argmin(away))
        own = hands[t, rows, columns] == hands[t, rows[nearest], columns[nearest]]
        gap[t] = (away[nearest] - 1) / min(height, width)
        beside[t] = (columns[own].mean() + 0.5) / width, (rows[own].mean() + 0.5) / height
    return Grasp(gap, beside - track.at)


def eighth(frames: int) -> int:
    """How many frames count as the start, and as the end, of a clip."""
    return max(1, frames // 8)


def measure(track: Track, grasp: Grasp, labels: np.ndarray) -> Motion:
    """The motion of a thing that is seen in at least one frame."""
    frames, seen, k = len(labels), np.flatnonzero(track.seen), eighth(len(labels))
    path = _smooth(np.column_stack([track.at[seen], np.log(track.area[seen]) / 2]))
    raw = np.column_stack([track.at[seen], np.log(track.area[seen]) / 2])
    first, last = np.median(raw[:k], axis=0), np.median(raw[-k:], axis=0)
    ways = np.abs(np.diff(path, axis=0)).sum(axis=0)
    net = last - first
    gone = seen[-1] < frames - k and not np.diff(seen[seen >= seen[0]], prepend=seen[0] - 1).max() > 1
    gaps = np.where(np.isnan(grasp.gap[seen]), 1.0, grasp.gap[seen])
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
        released=bool(np.median(gaps[-k:]) >= TOUCH),
        gone=bool(gone),
        last_gap=float(gaps[-k:].min()),
        whitened=float((labels[-k:, place] == WHITE).mean()) if place.any() else 0.0,
    )


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
