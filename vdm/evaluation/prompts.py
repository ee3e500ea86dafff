"""What a prompt of mini-something asks for, in whichever of its wordings: the action, the colours and the shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vdm.data.phrasing import NUM_FORMS, rephrased
from vdm.vocabulary import ACTIONS, COLOURS, COVER, SHAPES

_THING = f"(?:(?:an?|the) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_SLOT = "a blue cup"  # what stands for a thing in a sentence until it is a pattern
# Where the main thing goes, in the words of vdm.metrics.actions; other actions have no one direction.
DIRECTIONS = {
    "push_left_to_right": "right", "push_right_to_left": "left", "pull_left_to_right": "right",
    "pull_right_to_left": "left", "pick_up": "up", "move_down": "down", "put_on_surface": "down",
    "move_towards_camera": "nearer", "move_away_from_camera": "farther", "move_closer": "together",
    "move_apart": "apart",
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What a clip is to show: the name of one of ACTIONS, and colour and shape of each thing in it."""

    action: str
    colours: tuple[str, ...]
    shapes: tuple[str, ...]

    @property
    def direction(self) -> str | None:
        return DIRECTIONS.get(self.action)


def asked(prompt: str) -> Asked | None:
    """None where the prompt is none of mini-something's."""
    words = " ".join(prompt.lower().split()).rstrip(" .")
    for action, pattern in _PATTERNS:
        if match := pattern.fullmatch(words):
            found = match.groups()
            return Asked(action, found[::2], found[1::2])
    return None


def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """Every action in every wording."""
    patterns = []
    for action in ACTIONS:
        things = [_SLOT, COVER] if action.name == "cover" else [_SLOT] * action.num_slots
        for form in range(NUM_FORMS):
            text = re.escape(rephrased(action.template, things, form=form)).replace(re.escape(_SLOT), _THING)
            patterns.append((action.name, re.compile(text)))
    return patterns


_PATTERNS = _patterns()
