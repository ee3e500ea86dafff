"""Which scene a (seed, index) stands for - who, where, in what light - and where its things land in a frame."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vdm.data.drawing import RGB, Stage, hsv
from vdm.data.scenes import MOTIONS, PROPORTIONS, Body, Dice, Hand, Play, still
from vdm.vocabulary import ACTIONS, COLOURS, SHAPES, SHAPES_WITH_A_TOP, Action


@dataclass(frozen=True)
class Scene:
    """Everything about a clip but the instants at which it is looked at."""

    action: Action
    stage: Stage
    play: Play
    bystanders: tuple[Body, ...]
    skin: RGB
    sleeve: RGB
    hand_size: float
    flip: int  # light from the left (1) or the right (-1)
    shake: np.ndarray  # (2 axes, 2 waves, 3): amplitude in frames, Hz, phase


def shake_at(scene: Scene, seconds: np.ndarray) -> np.ndarray:
    """The camera's shake: two slow waves per axis, (T,2) in fractions of the frame."""
    amplitude, hertz, phase = np.moveaxis(scene.shake, 2, 0)[..., None]
    return (amplitude * np.sin(2 * np.pi * hertz * seconds + phase)).sum(axis=1).T


@dataclass(frozen=True)
class Frame:
    """The camera: from fractions of the frame to pixels, for every instant at once."""

    height: int
    width: int
    shake: np.ndarray  # (T,2) in fractions of the frame

    @property
    def size(self) -> np.ndarray:
        return np.array([self.width, self.height], dtype=np.float64)

    @property
    def unit(self) -> int:
        return min(self.height, self.width)

    def place(self, body: Body, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centre (T,2) and bounding box (T,2) in pixels, and degrees (T,)."""
        degrees = body.degrees.at(u)
        own = body.scale.at(u)[:, None] * (body.width, body.height) * self.unit
        point = np.stack([body.x.at(u), body.ground.at(u) - body.lift.at(u)], axis=1)
        centre = (point + self.shake) * self.size - own * (0, 0.5)
        cos, sin = np.abs(np.cos(np.radians(degrees))), np.abs(np.sin(np.radians(degrees)))
        box = np.stack([cos * own[:, 0] + sin * own[:, 1], sin * own[:, 0] + cos * own[:, 1]], axis=1)
        return centre, box, degrees

    def touch(self, hand: Hand, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the hand's contact point is, (T,2) in pixels, and its arm's direction in degrees (T,)."""
        centre, box, _ = self.place(hand.follows, u)
        degrees = hand.direction.at(u)
        arm = np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)
        # The outline of the object, as a rounded box (a superellipse of power 3), in the arm's direction.
        radius = ((np.abs(arm) / (box / 2)) ** 3).sum(axis=1) ** (-1 / 3)
        reach = radius + hand.gap.at(u) * hand.follows.scale.at(u) * self.unit
        return centre + arm * reach[:, None], degrees


def _object_paint(rng: np.random.Generator, colour: str) -> RGB:
    low, high = COLOURS[colour].hues[-1][0], COLOURS[colour].hues[0][1]
    high += 180 * (high < low)  # red goes around
    margin = 0.2 * (high - low)
    return hsv(rng.uniform(low + margin, high - margin), rng.uniform(180, 235), rng.uniform(205, 250))


def _body(dice: Dice, shape: str, colour: str, scale: float) -> Body:
    size = scale * dice.number(0.21, 0.27)
    width, height = PROPORTIONS[shape]
    ground = dice.number(0.72, 0.84)
    return Body(shape, colour, _object_paint(dice.rng, colour), width * size, height * size, still(0.5), still(ground))


def _neutral(rng: np.random.Generator, value: float, most: float) -> RGB:
    """A wall, table or floor: any hue, hardly saturated (warm ones may be a little more so)."""
    warm = rng.random() < 0.6
    hue, saturation = (rng.uniform(10, 24), rng.uniform(8, most)) if warm else (rng.uniform(0, 180), rng.uniform(8, 34))
    return hsv(hue, saturation, min(value, 235))


def _stage(dice: Dice, play: Play) -> Stage:
    rng = dice.rng
    value = dice.number(105, 205)
    contrast = dice.number(35, 60) * (1 if value < 155 else -1)  # the wall must stand out from the table
    end, end_side = play.table_end or (None, 1)
    return Stage(
        wall=_neutral(rng, value + contrast, 45),
        table=_neutral(rng, value, 52),
        floor=_neutral(rng, value * 0.5, 30),
        horizon=dice.number(0.4, 0.5),
        front=dice.number(0.84, 0.88) if play.table_end else dice.number(0.93, 1.12),
        end=end,
        end_side=end_side,
        light=dice.number(0.92, 1.08),
        lamp=(dice.number(0, 1), dice.number(-0.1, 0.5)),
        falloff=dice.number(0.1, 0.3),
        stripes=int(rng.integers(3, 8)) if rng.random() < 0.3 else 0,
        skirting=bool(rng.random() < 0.4),
        grain_seed=int(rng.integers(2**31)),
    )


def _clear_of(play: Play, hand_size: float, body: Body) -> bool:
    """Whether `body` keeps away from all that moves, at any time (judged in a square frame, the tightest)."""
    u = np.linspace(0, 1, 33)
    square = Frame(1, 1, np.zeros((33, 2)))
    centre, extent, _ = square.place(body, u)
    boxes = [square.place(other, u)[:2] for other in play.bodies]
    for hand in play.hands:
        contact, degrees = square.touch(hand, u)
        arm = np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)
        boxes += [(contact + arm * reach, np.full((33, 2), 1.4 * hand_size)) for reach in np.arange(-0.05, 1.2, 0.12)]
    return not any((np.abs(centre - c) < (extent + e) / 2 + 0.03).all(axis=1).any() for c, e in boxes)


def _bystanders(dice: Dice, play: Play, hand_size: float, horizon: float) -> tuple[Body, ...]:
    """Now and then a distractor of another colour, where nothing will touch it."""
    crowded = len(play.bodies) > 1 or play.table_end or any(hand.pose == "carry" for hand in play.hands)
    if crowded or dice.rng.random() > 0.38:
        return ()
    for _ in range(8):
        colour = str(dice.rng.choice([name for name in COLOURS if name != play.bodies[0].colour]))
        body = _body(dice, str(dice.rng.choice(SHAPES)), colour, 0.75)
        body = replace(body, x=still(dice.number(0.1, 0.9)), ground=still(dice.number(horizon + 0.05, 0.9)))
        if _clear_of(play, hand_size, body):
            return (body,)
    return ()


def compose(index: int, *, seed: int) -> Scene:
    """The scene that (seed, index) stands for; every draw comes from a generator of its own."""
    rng = np.random.default_rng([seed, index])
    dice = Dice(rng)
    action = ACTIONS[int(rng.integers(len(ACTIONS)))]
    shapes = [str(s) for s in rng.choice(SHAPES_WITH_A_TOP if action.name == "turn_upside_down" else SHAPES, size=2)]
    colours = [str(c) for c in rng.choice(list(COLOURS), size=2, replace=False)]
    scale = {"move_closer": 0.76, "move_apart": 0.76, "cover": 0.85}.get(action.name, 1.0)
    first, second = (_body(dice, shape, colour, scale) for shape, colour in zip(shapes, colours, strict=True))
    play = MOTIONS[action.name](dice, first, second)
    stage = _stage(dice, play)
    hand_size = dice.number(0.175, 0.21)
    return Scene(
        action=action,
        stage=stage,
        play=play,
        bystanders=_bystanders(dice, play, hand_size, stage.horizon),
        skin=hsv(rng.uniform(9.5, 16.5), rng.uniform(70, 118), rng.uniform(130, 245)),
        sleeve=_neutral(rng, float(rng.choice([55, 90, 225])), 30),
        hand_size=hand_size,
        flip=dice.side(),
        shake=rng.uniform((0.0, 0.15, 0.0), (0.004, 1.2, 2 * np.pi), size=(2, 2, 3)),
    )
