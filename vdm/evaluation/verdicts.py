"""Whether a clip shows what its prompt asks for, where that is mini-something's: rows of verdicts, and marks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vdm.data.transforms import Frames
from vdm.errors import UserError
from vdm.evaluation.clips import Shape
from vdm.evaluation.extract import Opened, Rows, Side
from vdm.evaluation.measures import PerClip, Values
from vdm.metrics.action_scores import DIRECTIONS, NOTHING, Prompt, mark, read_prompt
from vdm.metrics.actions import RULES_VERSION, Verdict, judge
from vdm.vocabulary import ACTIONS, COLOURS, SHAPES

NAMES = tuple(action.name for action in ACTIONS)
WAYS = tuple(dict.fromkeys(DIRECTIONS.values()))
HUES = tuple(COLOURS)
MOST_THINGS = 2

Mark = Literal["valid", "action", "direction", "colour", "shape", "joint"]


def open_judge(path: Path | None, device: torch.device, shape: Shape) -> Opened:
    """Rows of verdicts, which do not depend on the prompts."""

    def rows(frames: Frames, prompts: Sequence[str]) -> Rows:
        return np.stack([encoded(judge(clip)) for clip in frames])

    return Opened(rows, {"layer": f"rules {RULES_VERSION}", "dtype": "float64"})


def encoded(verdict: Verdict) -> Rows:
    """A verdict as numbers, each the place of a name in its list, or -1: action, direction, then colour and shape of
    each thing that is acted on; and for each colour whether it is seen at all."""
    things = list(zip(verdict.colours, verdict.shapes, strict=True))[:MOST_THINGS]
    numbers = [_place(NAMES, verdict.action), _place(WAYS, verdict.direction)]
    for hue, form in [*things, *[(None, None)] * (MOST_THINGS - len(things))]:
        numbers += [_place(HUES, hue), _place(SHAPES, form)]
    return np.array([*numbers, *(hue in verdict.found for hue in HUES)], dtype=np.float64)


def decoded(row: Rows) -> Verdict:
    """The verdict again."""
    action, way, *rest = row.astype(int).tolist()
    things, found = rest[: 2 * MOST_THINGS], rest[2 * MOST_THINGS :]
    pairs = [pair for pair in zip(things[::2], things[1::2], strict=True) if min(pair) >= 0]
    return Verdict(
        action=None if action < 0 else NAMES[action],
        direction=None if way < 0 else WAYS[way],
        colours=tuple(HUES[hue] for hue, _ in pairs),
        shapes=tuple(SHAPES[form] for _, form in pairs),
        found=tuple(name for name, seen in zip(HUES, found, strict=True) if seen),
    )


def _place(names: Sequence[str], name: str | None) -> int:
    return names.index(name) if name in names else -1


@lru_cache(maxsize=1 << 14)
def asked(prompt: str) -> Prompt | None:
    """What a prompt asks for; None where it is none of mini-something's, which name a colour and a shape."""
    try:
        found = read_prompt(prompt)
    except UserError:
        return None
    return found if found.colours and found.shapes else None


def marked(name: Mark) -> PerClip:
    """The share of clips that pass; one does not count where its prompt does not ask for such a thing."""

    def values(side: Side, reference: Side) -> Values:
        out = np.full(len(side.clips), np.nan)
        for i, (clip, row) in enumerate(zip(side.clips, side.rows, strict=True)):
            if (prompt := asked(clip.prompt)) is not None:
                passed = getattr(mark(decoded(row), prompt), name)
                out[i] = np.nan if passed is None else float(passed)
        return out

    return PerClip(values, share=True)


def confusion(side: Side) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    """What was asked for (rows), what was seen (columns, one more for nothing known), and how often: (R,C)."""
    counts = np.zeros((len(NAMES), len(NAMES) + 1), dtype=np.int64)
    for clip, row in zip(side.clips, side.rows, strict=True):
        if (prompt := asked(clip.prompt)) is not None:
            counts[NAMES.index(prompt.action), int(row[0])] += 1  # -1 is the last column
    return NAMES, (*NAMES, NOTHING), counts
