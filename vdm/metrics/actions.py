"""Which of mini-something's sixteen actions a clip shows, by fixed rules on its pixels: no learned judge, no prompt.

Colours are found by hue, followed through the frames, and a handful of numbers about their paths and the hand decide.
The thresholds lie in the wide gaps between what rendered clips of different actions measure; they were set on clips
that no accuracy was reported on, and are frozen: whoever changes a rule raises RULES_VERSION.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vdm.metrics.segmentation import NAMES, Segments, segment
from vdm.metrics.silhouettes import resemblance
from vdm.metrics.trajectories import LEAST_AREA, TOUCH, Grasp, Motion, Track, eighth, find_hands, follow, grasp, measure
from vdm.vocabulary import SHAPES, SHAPES_WITH_A_TOP

RULES_VERSION = 1

THING_AREA = 0.01  # of the frame, where it looks largest
STEP = 0.12  # of the frame: the least way that counts
TOGETHER_STEP = 0.06  # the same for each of two things
THROW = 0.2  # of the frame: the least height
STILL = 0.06  # of the frame: the most that counts as none
GROWTH = 0.3  # in log size: 1.35 times as large
TURNED_RISE, TURN = 0.05, 0.1  # how high it is lifted for that, and the change of looks
TOUCHED = 0.5  # the least share of the frames

TOPPED = [SHAPES.index(shape) for shape in SHAPES_WITH_A_TOP]


@dataclass(frozen=True)
class Verdict:
    """What a clip shows. Without any coloured thing that can be followed it is not valid, and all else is empty."""

    action: str | None  # the name of one of ACTIONS
    direction: str | None  # right, left, up, down, nearer, farther, together or apart: the main motion, whoever made it
    colours: tuple[str, ...]  # of what is acted on (of two things, the left one first)
    shapes: tuple[str, ...]
    found: tuple[str, ...]  # every colour that is seen

    @property
    def valid(self) -> bool:
        return bool(self.found)


@dataclass(frozen=True)
class Thing:
    """One coloured thing: where it is, how a hand is to it, what becomes of it."""

    track: Track
    grasp: Grasp
    motion: Motion


def judge(clip: np.ndarray) -> Verdict:
    """Judge a clip, uint8 RGB (T,H,W,3), of at least 2 frames.

    Raises ValueError for anything else.
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or len(clip) < 2:
        raise ValueError(f"a clip is uint8 (T,H,W,3) with T >= 2, got {clip.dtype} {clip.shape}")
    segments = segment(clip)
    hands = find_hands(segments.labels)
    things = _find_things(segments, hands)
    if not things:
        return Verdict(None, None, (), (), ())
    pair = _pair(things)
    acted = pair or things[:1]
    return Verdict(
        action=_act_on_two(pair) if pair else _act(things[0], segments, hands),
        direction=_way_of_two(pair) if pair else _direction(things[0].motion),
        colours=tuple(NAMES[thing.track.label - 1] for thing in acted),
        shapes=tuple(_shape(thing, segments, hands) for thing in acted),
        found=tuple(NAMES[thing.track.label - 1] for thing in things),
    )


def _find_things(segments: Segments, hands: np.ndarray) -> list[Thing]:
    """Whatever is there in at least half of the first third of the frames, what is most acted on first."""
    start = max(1, round(len(hands) / 3))
    pixels = np.bincount(segments.labels[:start].ravel(), minlength=1 + len(NAMES))
    things = []
    for label in range(1, 1 + len(NAMES)):
        if pixels[label] < 0.5 * LEAST_AREA * segments.labels[:start].size:
            continue
        track = follow(segments.labels, label)
        if track.seen[:start].mean() >= 0.5 and track.area.max() >= THING_AREA:
            near = grasp(track, hands)
            things.append(Thing(track, near, measure(track, near, segments.labels)))
    return sorted(things, key=lambda thing: -thing.motion.activity)


# ---- two things ----


def _pair(things: list[Thing]) -> list[Thing]:
    """The two most active things, the left one first, if they go opposite ways; else nothing."""
    if len(things) < 2:
        return []
    left, right = sorted(things[:2], key=lambda thing: float(thing.track.at[thing.track.seen][0, 0]))
    ways = left.motion.right, right.motion.right
    opposite = ways[0] * ways[1] < 0 and min(abs(ways[0]), abs(ways[1])) >= TOGETHER_STEP
    return [left, right] if opposite and not left.motion.gone and not right.motion.gone else []


def _way_of_two(pair: list[Thing]) -> str:
    return "together" if pair[0].motion.right > 0 else "apart"


def _act_on_two(pair: list[Thing]) -> str | None:
    steady = all(_straight(thing.motion, 0, thing.motion.right) for thing in pair)
    touched = all(thing.motion.contact >= TOUCHED for thing in pair)
    if not steady or not touched:
        return None
    return "move_closer" if _way_of_two(pair) == "together" else "move_apart"


# ---- one thing ----


def _direction(m: Motion) -> str | None:
    if m.gone:
        return None
    if abs(m.growth) >= GROWTH:
        return "nearer" if m.growth > 0 else "farther"
    if max(abs(m.right), abs(m.up)) < STEP:
        return None
    if abs(m.right) > abs(m.up):
        return "right" if m.right > 0 else "left"
    return "up" if m.up > 0 else "down"


def _straight(m: Motion, axis: int, net: float) -> bool:
    """Whether it went there and not to and fro: frames out of order do not show a motion."""
    return m.detours[axis] <= 0.7 * abs(net) + 0.04


def _act(thing: Thing, segments: Segments, hands: np.ndarray) -> str | None:
    """The first rule that holds, else None."""
    m, direction = thing.motion, _direction(thing.motion)
    if m.gone:
        return _leave(m)
    if direction in ("nearer", "farther"):
        named = "move_towards_camera" if direction == "nearer" else "move_away_from_camera"
        return named if _straight(m, 2, m.growth) and m.contact >= TOUCHED else None
    if direction in ("left", "right"):
        return _slide(m, direction)
    if direction in ("up", "down"):
        return _lift(m, direction)
    once = m.way_up_and_down <= 2.6 * m.rise + 0.04
    if m.rise >= THROW:
        thrown = m.top_gap >= 0.1 and not (m.first_gap >= 0.16 or m.last_gap >= 0.16)  # it may hide the hand
        return "throw_and_catch" if once and thrown else None
    if m.held < TOUCHED:
        return None
    if once and m.rise >= TURNED_RISE and _turned(thing, segments, hands):
        return "turn_upside_down"
    return "hold" if m.wander <= STILL else None


def _leave(m: Motion) -> str | None:
    """Pushed off the table, or covered."""
    if abs(m.right) >= STEP:
        fell = -m.up >= 0.06 and _straight(m, 0, m.right) and m.contact >= 0.3 and m.hand_ahead < 0
        return "push_off_table" if fell else None
    return "cover" if m.whitened >= TOUCHED and m.last_gap < 0.35 and m.wander <= STEP else None


def _slide(m: Motion, direction: str) -> str | None:
    if m.contact < TOUCHED or not _straight(m, 0, m.right) or m.wander > 1.3 * abs(m.right):
        return None
    verb = "pull" if m.hand_ahead > 0 else "push"
    return f"{verb}_left_to_right" if direction == "right" else f"{verb}_right_to_left"


def _lift(m: Motion, direction: str) -> str | None:
    if m.contact < TOUCHED or not _straight(m, 1, m.up):
        return None
    released = not m.last_gap < TOUCH  # there may be no hand
    if direction == "up":
        return None if released else "pick_up"
    return "put_on_surface" if released else "move_down"


# ---- looks ----


def _looks(thing: Thing, frames: list[int], segments: Segments, hands: np.ndarray) -> np.ndarray:
    """Mean resemblance to each shape, upright and upside down, over these frames: (5,2)."""
    masks, saturation, value = thing.track.masks, segments.saturation, segments.value
    looks = (resemblance(masks[t], saturation=saturation[t], value=value[t], hidden=hands[t] > 0) for t in frames)
    return np.mean(list(looks), axis=0)


def _turned(thing: Thing, segments: Segments, hands: np.ndarray) -> bool:
    """Whether it looks less like a cup, or a bottle, that stands at the end than at the start, and more like one
    upside down. Both may be blurred, so that neither look need be a clear one."""
    seen, k = np.flatnonzero(thing.track.seen).tolist(), eighth(len(hands))
    start, end = (_looks(thing, frames, segments, hands)[TOPPED] for frames in (seen[:k], seen[-k:]))
    change = (start[:, 0] - start[:, 1]) - (end[:, 0] - end[:, 1])
    return bool(change.max() >= TURN)


def _shape(thing: Thing, segments: Segments, hands: np.ndarray) -> str:
    """By the three frames that show it best: near the start or end, where it stands, away from hands, and large."""
    frames, track = len(hands), thing.track
    choice = [*range(max(1, frames // 4)), *range(frames - eighth(frames), frames)]
    gaps = np.nan_to_num(thing.grasp.gap, nan=1.0).round(1)
    best = sorted((t for t in choice if track.seen[t]), key=lambda t: (-gaps[t], -track.area[t]))[:3]
    best = best or np.flatnonzero(track.seen)[:1].tolist()
    return SHAPES[int(np.argmax(_looks(thing, best, segments, hands).max(axis=1)))]
