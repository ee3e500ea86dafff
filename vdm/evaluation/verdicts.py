"""Whether a clip shows what its prompt asks for, for prompts of mini-something: rows of verdicts, and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from vdm.data.transforms import Frames
from vdm.evaluation.clips import Shape
from vdm.evaluation.extract import Opened, Rows, Side
from vdm.evaluation.measures import Values
from vdm.evaluation.prompts import DIRECTIONS, Asked, asked
from vdm.metrics.actions import RULES_VERSION, Verdict, judge
from vdm.vocabulary import ACTIONS, COLOURS, SHAPES

NAMES = tuple(action.name for action in ACTIONS)
WAYS = tuple(dict.fromkeys(DIRECTIONS.values()))
HUES = tuple(COLOURS)
NOTHING = "nothing known"

Test = Callable[[Asked, Verdict], bool | None]


def open_judge(path: Path | None, device: torch.device, shape: Shape) -> Opened:
    """Rows of verdicts, which do not depend on the prompts."""

    def rows(frames: Frames, prompts: Sequence[str]) -> Rows:
        return np.stack([encoded(judge(clip)) for clip in frames])

    return Opened(rows, {"layer": f"rules {RULES_VERSION}", "dtype": "float64"})


def encoded(verdict: Verdict) -> Rows:
    """A verdict as numbers: action and direction by their place or -1, then how often each colour and shape is named,
    and which colours are seen at all."""
    action = -1 if verdict.action is None else NAMES.index(verdict.action)
    way = -1 if verdict.direction not in WAYS else WAYS.index(verdict.direction)
    counts = [verdict.colours.count(hue) for hue in HUES] + [verdict.shapes.count(shape) for shape in SHAPES]
    return np.array([action, way, *counts, *(hue in verdict.found for hue in HUES)], dtype=np.float64)


def decoded(row: Rows) -> Verdict:
    """The verdict again; of two things the order is lost."""
    action, way = int(row[0]), int(row[1])
    hues, shapes, found = np.split(row[2:].astype(int), [len(HUES), len(HUES) + len(SHAPES)])
    return Verdict(
        action=None if action < 0 else NAMES[action],
        direction=None if way < 0 else WAYS[way],
        colours=tuple(name for name, count in zip(HUES, hues, strict=True) for _ in range(count)),
        shapes=tuple(name for name, count in zip(SHAPES, shapes, strict=True) for _ in range(count)),
        found=tuple(name for name, seen in zip(HUES, found, strict=True) if seen),
    )


def scored(test: Test) -> Callable[[Side], Values]:
    """1 where a clip passes, 0 where it does not, NaN where its prompt does not ask: (N,)."""

    def values(side: Side) -> Values:
        out = np.full(len(side.clips), np.nan)
        for i, (clip, row) in enumerate(zip(side.clips, side.rows, strict=True)):
            wanted = asked(clip.prompt)
            passed = None if wanted is None else test(wanted, decoded(row))
            if passed is not None:
                out[i] = float(passed)
        return out

    return values


def shows_things(wanted: Asked, verdict: Verdict) -> bool:
    """Everything is there in the colours asked for, whatever it does."""
    return set(wanted.colours) <= set(verdict.found)


def right_action(wanted: Asked, verdict: Verdict) -> bool:
    return verdict.action == wanted.action


def right_direction(wanted: Asked, verdict: Verdict) -> bool | None:
    return None if wanted.direction is None else verdict.direction == wanted.direction


def right_colours(wanted: Asked, verdict: Verdict) -> bool:
    return sorted(verdict.colours) == sorted(wanted.colours)


def right_shapes(wanted: Asked, verdict: Verdict) -> bool:
    return sorted(verdict.shapes) == sorted(wanted.shapes)


def all_right(wanted: Asked, verdict: Verdict) -> bool:
    """Action, colours and shapes."""
    return all(test(wanted, verdict) for test in (right_action, right_colours, right_shapes))


def confusion(side: Side) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    """What was asked for (rows), what was seen (columns, one more for nothing known), and how often: (R,C)."""
    counts = np.zeros((len(NAMES), len(NAMES) + 1), dtype=np.int64)
    for clip, row in zip(side.clips, side.rows, strict=True):
        if (wanted := asked(clip.prompt)) is not None:
            counts[NAMES.index(wanted.action), int(row[0])] += 1  # -1 is the last column
    return NAMES, (*NAMES, NOTHING), counts
