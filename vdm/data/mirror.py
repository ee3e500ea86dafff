"""What a mirror does to a caption: left and right change places, where they are meant; and where that cannot be told,
the clip is not mirrored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vdm.templates import SSV2_TEMPLATES

# The templates whose meaning a mirror turns round.
TURNED: frozenset[str] = frozenset(
    {
        "Pulling [something] from left to right",
        "Pulling [something] from right to left",
        "Pushing [something] from left to right",
        "Pushing [something] from right to left",
        "Turning the camera left while filming [something]",
        "Turning the camera right while filming [something]",
    }
)
# All others keep theirs, though some have the word: "pulling it right out" is an idiom, and "upright" is another word.
UNTURNED: frozenset[str] = frozenset(SSV2_TEMPLATES) - TURNED

_TURNS = re.compile(r"clockwise\b", re.IGNORECASE)  # nothing says which way a mirrored "anticlockwise" is spelt
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
# In captions without a template, these mean sides beyond doubt.
_DIRECTIONS = re.compile(
    r"\b(from (the )?(left|right)( side)? to (the )?(left|right)|left to right|right to left|"
    r"(to|from|on|towards?|at) (the|its|his|her|their|my) (left|right)|leftwards?|rightwards?)\b",
    re.IGNORECASE,
)
_OTHER = {"left": "right", "right": "left"}


def mirrored(text: str, *, template: str = "", placeholders: Sequence[str] = ()) -> str | None:
    """The caption of the mirrored clip; None where the clip must not be mirrored.

    `text` is any wording of the clip's caption. A template decides where there is one, unless a side stands in what
    fills its slots ("left foot"). Without one the sides are changed if each is part of a direction, such as "from left
    to right"; a clip that turns clockwise is not mirrored. The mirror of a mirror is the text itself.
    """
    if any(_SIDES.search(filler) for filler in placeholders) or _TURNS.search(text):
        return None
    if template in UNTURNED or not re.search(r"\b(left|right)", text, re.IGNORECASE):
        return text
    if template in TURNED:
        return swap_sides(text)
    beside = _DIRECTIONS.sub("", text)
    return None if re.search(r"\b(left|right)", beside, re.IGNORECASE) else swap_sides(text)


def swap_sides(text: str) -> str:
    """Every whole word "left" or "right" (or "leftward", "rightwards") replaced by the other, in its own case."""
    return re.sub(r"\b(left|right)(?=(wards?)?\b)", _swap, text, flags=re.IGNORECASE)


def _swap(match: re.Match[str]) -> str:
    word = match[1]
    other = _OTHER[word.lower()]
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other
