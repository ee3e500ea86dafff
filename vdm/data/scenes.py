"""The sixteen motions of mini-something: who is on the table, and how everything moves.

A scene is a function of the clip's own time u in [0, 1): a handful of keyframed tracks, drawn from one random
generator, so that a clip sampled with more frames shows the same scene at more instants. Everything moves within
u <= 0.85, which the last of 8 frames (u = 0.875) still sees.
Positions are fractions of the frame, y down; sizes are fractions of its shorter side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from vdm.data.drawing import RGB

END = 0.85
LEFT, RIGHT = -1, 1
PROPORTIONS = {  # (width, height) of each shape, for one nominal size
    "ball": (0.95, 0.95),
    "box": (1.1, 0.95),
    "cup": (1.0, 0.95),
    "bottle": (0.58, 1.2),
    "book": (1.35, 0.66),
}


@dataclass(frozen=True)
class Track:
    """A number over time: keys (u, value), and how it goes from each key to the next (default: all "smooth").

    "out" decelerates and "in" accelerates evenly, as things thrown and falling do.
    """

    keys: tuple[tuple[float, float], ...]
    eases: tuple[str, ...] = ()

    def at(self, u: np.ndarray) -> np.ndarray:
        value = np.full(u.shape, self.keys[0][1])
        for i, ((u0, v0), (u1, v1)) in enumerate(zip(self.keys, self.keys[1:], strict=False)):
            s = np.clip((u - u0) / (u1 - u0), 0, 1)
            ease = self.eases[i] if self.eases else "smooth"
            s = {"smooth": s * s * (3 - 2 * s), "out": 1 - (1 - s) ** 2, "in": s * s}[ease]
            value = np.where(u >= u0, v0 + (v1 - v0) * s, value)
        return value


def track(*keys: tuple[float, float], eases: tuple[str, ...] = ()) -> Track:
    assert all(before[0] < after[0] for before, after in zip(keys, keys[1:], strict=False)), keys
    return Track(keys, eases)


def still(value: float) -> Track:
    return Track(((0.0, value),))


@dataclass(frozen=True)
class Body:
    """Something that stands on, or is held over, a point (x, ground) of the table."""

    shape: str
    colour: str
    rgb: RGB
    width: float
    height: float
    x: Track
    ground: Track
    lift: Track = still(0)  # of its lowest point over the ground
    scale: Track = still(1)
    degrees: Track = still(0)


@dataclass(frozen=True)
class Hand:
    """A hand that touches a body (or a ghost of one): seen from it the arm lies in `direction` (0 right, 90 down)."""

    follows: Body
    direction: Track
    gap: Track  # between hand and body, along the arm; negative overlaps
    pose: str = "grip"


@dataclass(frozen=True)
class Play:
    """All that moves in a scene; bodies in drawing order."""

    bodies: tuple[Body, ...]
    hands: tuple[Hand, ...]
    hidden_from: float | None = None  # u from which a cloth hides the first body
    table_end: tuple[float, int] | None = None  # where the table stops, and at which side


@dataclass(frozen=True)
class Dice:
    """One scene's random choices."""

    rng: np.random.Generator

    def number(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def side(self) -> int:
        return LEFT if self.rng.random() < 0.5 else RIGHT

    def span(self) -> tuple[float, float]:
        """When the main motion starts and ends."""
        return self.number(0.1, 0.2), self.number(0.66, 0.8)


Motion = Callable[[Dice, "Body", "Body"], Play]


def _side_angle(side: int, elevation: float) -> float:
    """The direction of an arm that comes from the given side, `elevation` degrees above the horizontal."""
    return -elevation if side == RIGHT else 180 + elevation


def _leave(dice: Dice, start: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Two keys of a gap that opens: the hand lets go and withdraws."""
    return (start, 0.0), (min(start + dice.number(0.14, 0.2), END), dice.number(0.7, 1.0))


def slide(dice: Dice, body: Body, _: Body, *, towards: int, pull: bool) -> Play:
    """Push (hand behind, at the far side of where it goes) or pull (hand ahead)."""
    a, b = dice.span()
    distance, middle = dice.number(0.33, 0.44), dice.number(0.46, 0.54) + (-0.04 if pull else 0.04) * towards
    body = replace(body, x=track((a, middle - towards * distance / 2), (b, middle + towards * distance / 2)))
    side = towards if pull else -towards
    gap = track((0, dice.number(0.08, 0.25)), (a, 0.0), (b, 0.0), (b + 0.05, dice.number(0.0, 0.04)))
    direction = still(_side_angle(side, dice.number(-12, 22)))
    return Play((body,), (Hand(body, direction, gap, "grip" if pull else "push"),))


def pick_up(dice: Dice, body: Body, _: Body) -> Play:
    a, b = dice.span()
    a += 0.08
    body = replace(body, lift=track((a, 0), (b, dice.number(0.25, 0.36))), x=_drift(dice, a, b))
    gap = track((0, dice.number(0.3, 0.6)), (a - 0.04, 0.0))
    return Play((body,), (Hand(body, still(_held_from(dice)), gap),))


def _drift(dice: Dice, a: float, b: float) -> Track:
    x = dice.number(0.36, 0.64)
    return track((a, x), (b, x + dice.number(-0.04, 0.04)))


def _held_from(dice: Dice) -> float:
    return _side_angle(dice.side(), dice.number(15, 50))


def move_down(dice: Dice, body: Body, _: Body) -> Play:
    a, b = dice.span()
    low = dice.number(0.07, 0.12)
    body = replace(body, lift=track((a, low + dice.number(0.24, 0.32)), (b, low)), x=_drift(dice, a, b))
    return Play((body,), (Hand(body, still(_held_from(dice)), still(0.0)),))


def put_on_surface(dice: Dice, body: Body, _: Body) -> Play:
    a, b = dice.number(0.06, 0.12), dice.number(0.48, 0.58)
    body = replace(body, lift=track((a, dice.number(0.26, 0.36)), (b, 0)), x=_drift(dice, a, b))
    gap = track((0, 0.0), *_leave(dice, b + 0.06))
    return Play((body,), (Hand(body, still(_held_from(dice)), gap),))


def move_in_depth(dice: Dice, body: Body, _: Body, *, nearer: bool) -> Play:
    a, b = dice.span()
    far, near = dice.number(0.6, 0.68), 1.2
    ends = [(far, dice.number(0.6, 0.64)), (near, dice.number(0.86, 0.92))]
    (scale0, ground0), (scale1, ground1) = ends if nearer else ends[::-1]
    x = dice.number(0.4, 0.6)
    body = replace(
        body,
        x=track((a, x), (b, 0.5 + (x - 0.5) * 1.3)),
        ground=track((a, ground0), (b, ground1)),
        scale=track((a, scale0), (b, scale1)),
        lift=still(dice.number(0.03, 0.07)),
    )
    direction = still(_side_angle(dice.side(), -dice.number(25, 50)))
    return Play((body,), (Hand(body, direction, still(0.0)),))


def turn_upside_down(dice: Dice, body: Body, _: Body) -> Play:
    a, b = dice.span()
    side, lift = dice.side(), dice.number(0.1, 0.18)
    x = dice.number(0.42, 0.58)
    body = replace(
        body,
        x=still(x),
        lift=track((a, 0.02), (a + 0.15, lift), (b - 0.15, lift), (b, 0.02)),
        degrees=track((a + 0.05, 0), (b - 0.05, 180 * side)),
    )
    direction = track((a + 0.05, _side_angle(side, -35)), (b - 0.05, _side_angle(side, 35)))
    upright = replace(body, degrees=still(0))  # the wrist turns in place: the hand stays beside the object
    return Play((body,), (Hand(upright, direction, still(0.015)),))


def push_off_table(dice: Dice, body: Body, _: Body) -> Play:
    towards = dice.side()
    edge = 0.5 + towards * dice.number(0.1, 0.2)
    a, tip = dice.number(0.06, 0.14), dice.number(0.5, 0.56)
    gone = dice.number(0.78, 0.84)
    x0, x1 = edge - towards * dice.number(0.34, 0.46), edge + towards * 0.02
    x2 = edge + towards * dice.number(0.1, 0.15)
    body = replace(body, ground=still(dice.number(0.74, 0.8)))
    pushed = replace(body, x=track((a, x0), (tip, x1)))
    body = replace(
        body,
        x=track((a, x0), (tip, x1), (gone, x2), eases=("smooth", "out")),
        lift=track((tip, 0), (gone, -0.75), eases=("in",)),
        degrees=track((tip - 0.04, 0), (gone, towards * dice.number(90, 160)), eases=("in",)),
    )
    gap = track((0, dice.number(0.08, 0.2)), (a, -0.01), (tip + 0.04, -0.01), (tip + 0.2, dice.number(0.05, 0.3)))
    hand = Hand(pushed, still(_side_angle(-towards, dice.number(0, 22))), gap, "push")
    return Play((body,), (hand,), table_end=(edge, towards))


def cover(dice: Dice, body: Body, _: Body) -> Play:
    a, b = dice.number(0.05, 0.12), dice.number(0.52, 0.6)
    side, x = dice.side(), dice.number(0.4, 0.6)
    ground = dice.number(0.76, 0.84)
    body = replace(body, x=still(x), ground=still(ground))
    light = 245 * dice.number(0.92, 1.0)
    cloth = Body(
        "cloth",
        "white",
        (light, light, light * dice.number(0.95, 1.0)),
        max(1.6 * body.width, 1.1 * body.height),
        1.32 * body.height + 0.02,
        x=track((a, x + side * dice.number(0.12, 0.24)), (a + 0.7 * (b - a), x)),
        ground=still(ground + 0.02),
        lift=track((a, dice.number(0.36, 0.42)), (a + 0.55 * (b - a), dice.number(0.3, 0.34)), (b, 0)),
        scale=track((b - 0.12, 0.9), (b, 1.0)),
    )
    gap = track((0, -0.05), *_leave(dice, b + 0.05))
    hand = Hand(cloth, still(_side_angle(side, dice.number(50, 70))), gap)
    return Play((body, cloth), (hand,), hidden_from=b)


def bring(dice: Dice, first: Body, second: Body, *, closer: bool) -> Play:
    """Two objects, a hand at the outer side of each, together or one after the other."""
    a, b = dice.span()
    middle = dice.number(0.47, 0.53)
    spans = {LEFT: (a, b), RIGHT: (a, b)}
    if dice.rng.random() < 0.4:
        half, early = (a + b) / 2, dice.side()
        spans = {early: (a, half + 0.05), -early: (half - 0.05, b)}
    pose = "push" if closer else "grip"
    bodies, hands = [], []
    for side, body in ((LEFT, first), (RIGHT, second)):
        start, stop = spans[side]
        near = body.width / 2 + dice.number(0.015, 0.035)
        reach = (near, near + dice.number(0.14, 0.165))
        reach = reach[::-1] if closer else reach
        body = replace(body, x=track((start, middle + side * reach[0]), (stop, middle + side * reach[1])))
        gap = track((0, dice.number(0.03, 0.1)), (start, 0.0))
        bodies.append(body)
        hands.append(Hand(body, still(_side_angle(side, dice.number(-8, 18))), gap, pose))
    return Play(tuple(bodies), tuple(hands))


def throw_and_catch(dice: Dice, body: Body, _: Body) -> Play:
    a, b = dice.number(0.12, 0.18), dice.number(0.74, 0.8)
    rest, rise, side = dice.number(0.09, 0.13), dice.number(0.3, 0.36), dice.side()
    x = dice.number(0.42, 0.58)
    dip = [(0.0, rest), (a - 0.06, rest - 0.04), (a, rest)]
    caught = [(b, rest), (b + 0.04, rest - 0.02)]
    body = replace(body, x=still(x), ground=still(dice.number(0.79, 0.85)))
    held = replace(body, lift=track(*dip, (a + 0.12, rest - 0.02), *caught))
    flight = ("smooth", "smooth", "out", "in", "smooth")
    body = replace(held, lift=track(*dip, ((a + b) / 2, rest + rise), *caught, eases=flight))
    return Play((body,), (Hand(held, still(90 + side), still(-0.01), "carry"),))


def hold(dice: Dice, body: Body, _: Body) -> Play:
    x, lift = dice.number(0.4, 0.6), dice.number(0.1, 0.24)
    body = replace(
        body,
        x=track((0, x), (0.5, x + dice.number(-0.012, 0.012)), (1, x)),
        lift=track((0, lift), (0.5, lift + dice.number(-0.012, 0.012)), (1, lift)),
    )
    return Play((body,), (Hand(body, still(_side_angle(dice.side(), dice.number(-35, 20))), still(0.0)),))


MOTIONS: dict[str, Motion] = {
    "push_left_to_right": partial(slide, towards=RIGHT, pull=False),
    "push_right_to_left": partial(slide, towards=LEFT, pull=False),
    "pull_left_to_right": partial(slide, towards=RIGHT, pull=True),
    "pull_right_to_left": partial(slide, towards=LEFT, pull=True),
    "pick_up": pick_up,
    "move_down": move_down,
    "put_on_surface": put_on_surface,
    "move_towards_camera": partial(move_in_depth, nearer=True),
    "move_away_from_camera": partial(move_in_depth, nearer=False),
    "turn_upside_down": turn_upside_down,
    "push_off_table": push_off_table,
    "cover": cover,
    "move_closer": partial(bring, closer=True),
    "move_apart": partial(bring, closer=False),
    "throw_and_catch": throw_and_catch,
    "hold": hold,
}
