"""What prompts ask for, and how often clips show it: verdicts of `vdm.metrics.actions` against prompts, as counts.

A prompt is a caption of mini-something in any of its wordings ("pushing ...", "a person pushes ...", "push ..."). What
it does not name is not asked for, and not counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vdm.errors import UserError
from vdm.metrics.actions import Verdict
from vdm.vocabulary import ACTIONS, COLOURS, SHAPES

DIRECTIONS = {
    "push_left_to_right": "right",
    "push_right_to_left": "left",
    "pull_left_to_right": "right",
    "pull_right_to_left": "left",
    "pick_up": "up",
    "move_down": "down",
    "put_on_surface": "down",
    "move_towards_camera": "nearer",
    "move_away_from_camera": "farther",
    "move_closer": "together",
    "move_apart": "apart",
}
NOTHING = "none"  # in the confusion matrix: a clip that shows none of the actions


@dataclass(frozen=True)
class Prompt:
    """What is asked for; colours and shapes are empty where a thing goes without one."""

    action: str
    colours: tuple[str, ...]
    shapes: tuple[str, ...]


@dataclass(frozen=True)
class Marks:
    """One clip against its prompt; None where the prompt asks for no such thing."""

    valid: bool  # something of every prompted colour (or of any, if none is prompted) is there
    action: bool
    direction: bool | None
    colour: bool | None  # of what is acted on
    shape: bool | None
    joint: bool  # the action, with the right things


@dataclass(frozen=True)
class Share:
    right: int
    of: int

    @property
    def value(self) -> float:
        return self.right / self.of if self.of else float("nan")


@dataclass(frozen=True)
class Scores:
    """Counts over clips: an interval is Wilson's of each share."""

    valid: Share
    action: Share
    direction: Share
    colour: Share
    shape: Share
    joint: Share
    recall: dict[str, Share]  # of each prompted action
    confusion: dict[str, dict[str, int]]  # prompted action -> action shown, or NOTHING -> clips


def read_prompt(text: str) -> Prompt:
    """Understand a caption. Raises UserError where it names none of the sixteen actions."""
    for action, pattern in _PATTERNS:
        found = pattern.search(text.lower())
        if found and not any(map(_MORE.search, (text[: found.start()].lower(), *found.groups()))):
            things = found.groups()[:1] if action == "cover" else found.groups()  # not the cloth
            return Prompt(action, _named(things, tuple(COLOURS)), _named(things, SHAPES))
    raise UserError(
        f"the prompt {text!r} names none of mini-something's sixteen actions, so no rule can judge it: "
        f"use a caption such as {ACTIONS[0].template.replace('[something]', 'a red ball')!r}, or leave out the actions"
    )


def mark(verdict: Verdict, prompt: Prompt) -> Marks:
    """Hold a clip's verdict against its prompt."""
    action, wanted = verdict.action == prompt.action, DIRECTIONS.get(prompt.action)
    colour = sorted(verdict.colours) == sorted(prompt.colours) if prompt.colours else None
    shape = sorted(verdict.shapes) == sorted(prompt.shapes) if prompt.shapes else None
    shown = sorted(zip(verdict.colours, verdict.shapes, strict=True))
    paired = not (colour and shape) or shown == sorted(zip(prompt.colours, prompt.shapes, strict=True))
    return Marks(
        valid=verdict.valid and set(prompt.colours) <= set(verdict.found),
        action=action,
        direction=None if wanted is None else verdict.direction == wanted,
        colour=colour,
        shape=shape,
        joint=action and colour is not False and shape is not False and paired,
    )


def score(verdicts: Sequence[Verdict], prompts: Sequence[Prompt]) -> Scores:
    """Count what is right; verdict i is of the clip that prompt i asked for.

    Raises ValueError where there are not as many of the one as of the other.
    """
    if len(verdicts) != len(prompts):
        raise ValueError(f"{len(verdicts)} verdicts do not go with {len(prompts)} prompts")
    marks = [mark(verdict, prompt) for verdict, prompt in zip(verdicts, prompts, strict=True)]
    recall, confusion = {}, {}
    for action in sorted({prompt.action for prompt in prompts}):
        shown = [verdict.action for verdict, prompt in zip(verdicts, prompts, strict=True) if prompt.action == action]
        recall[action] = Share(shown.count(action), len(shown))
        confusion[action] = dict(sorted(Counter(name or NOTHING for name in shown).items()))
    return Scores(
        valid=_share([m.valid for m in marks]),
        action=_share([m.action for m in marks]),
        direction=_share([m.direction for m in marks]),
        colour=_share([m.colour for m in marks]),
        shape=_share([m.shape for m in marks]),
        joint=_share([m.joint for m in marks]),
        recall=recall,
        confusion=confusion,
    )


def _share(marks: list[bool | None]) -> Share:
    counted = [m for m in marks if m is not None]
    return Share(sum(counted), len(counted))


def _named(things: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The one name in each thing's words, or nothing at all if a thing has none, or several."""
    found = [[word for word in re.findall(r"[a-z]+", words) if word in names] for words in things]
    return tuple(words[0] for words in found) if all(len(words) == 1 for words in found) else ()


def _pattern(template: str) -> re.Pattern[str]:
    """A template in any form of its verbs, with anyone as its subject."""
    words = re.sub(r"\b(\w+)(\w)ing\b", _any_form, template.lower().replace("[something]", "(.+)"))
    return re.compile(rf"\b{words}\W*$")


_MORE = re.compile(r"\b(and|then|but|while|without|before|after)\b")  # begins a further clause, which asks for more


def _any_form(verb: re.Match[str]) -> str:
    """putting -> put, puts, putting."""
    stem, last = verb.groups()
    return rf"{stem}{last}?\w*" if stem.endswith(last) else rf"{stem}{last}\w*"


_PATTERNS = [(action.name, _pattern(words)) for action in ACTIONS for words in (action.template, *action.others)]
