"""Prompts in all their wordings, and counts by hand."""

from __future__ import annotations

import math

import pytest

from vdm.data.captions import caption
from vdm.data.phrasing import num_forms, rephrased
from vdm.errors import UserError
from vdm.metrics.action_scores import NOTHING, Marks, Prompt, Share, mark, read_prompt, score
from vdm.metrics.actions import Verdict
from vdm.vocabulary import ACTIONS, COVER, Action

PUSH = Prompt("push_left_to_right", ("red",), ("ball",))
PAIR = Prompt("move_closer", ("red", "blue"), ("ball", "cup"))


def verdict(action: str | None, *things: str, direction: str | None = None) -> Verdict:
    colours, shapes = zip(*(thing.split() for thing in things), strict=True) if things else ((), ())
    return Verdict(action, direction, colours, shapes, colours)


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.name)
def test_every_wording_of_every_caption(action: Action) -> None:
    fillers = ["a red ball", COVER if action.name == "cover" else "a blue cup"][: action.num_slots]
    bare = [words.removeprefix("a ") for words in fillers]
    texts = [caption(action.template, fillers), action.template.replace("[something]", "the red ball")]
    texts += [
        rephrased(action.template, words, form=form)
        for words in (fillers, bare)
        for form in range(num_forms(action.template))
    ]
    for text in texts:
        prompt = read_prompt(text)
        assert prompt.action == action.name, text
        assert (prompt.colours[0], prompt.shapes[0]) == ("red", "ball"), text
        assert len(prompt.colours) == (1 if action.name == "cover" else action.num_slots)
    assert read_prompt(texts[0].upper() + ".").action == action.name


def test_what_a_prompt_does_not_name() -> None:
    assert read_prompt("Pushing something from left to right") == Prompt("push_left_to_right", (), ())
    assert read_prompt("holding a green thing") == Prompt("hold", ("green",), ())
    assert read_prompt("Moving a red ball and something closer to each other") == Prompt("move_closer", (), ())
    assert read_prompt("holding a red or blue ball") == Prompt("hold", (), ("ball",))


@pytest.mark.parametrize(
    "text",
    [
        "", "a dog runs", "pushing a red ball", "moving a red ball to the left", "raising a red cup and lowering it",
        "lifting up one end of a red box without letting it drop down",
    ],
)  # fmt: skip
def test_another_prompt_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="none of mini-something's sixteen actions"):
        read_prompt(text)


def test_marks_by_hand() -> None:
    all_right = Marks(valid=True, action=True, direction=True, colour=True, shape=True, joint=True)
    assert mark(verdict("push_left_to_right", "red ball", direction="right"), PUSH) == all_right
    pulled = mark(verdict("pull_left_to_right", "red ball", direction="right"), PUSH)
    assert pulled == Marks(valid=True, action=False, direction=True, colour=True, shape=True, joint=False)
    other = mark(verdict("push_left_to_right", "blue ball", direction="right"), PUSH)
    assert other == Marks(valid=False, action=True, direction=True, colour=False, shape=True, joint=False)
    empty = mark(verdict(None), PUSH)
    assert empty == Marks(valid=False, action=False, direction=False, colour=False, shape=False, joint=False)
    unnamed = mark(verdict("hold", "red ball"), Prompt("hold", (), ()))
    assert unnamed == Marks(valid=True, action=True, direction=None, colour=None, shape=None, joint=True)


def test_two_things_in_any_order_but_not_exchanged() -> None:
    assert mark(verdict("move_closer", "blue cup", "red ball", direction="together"), PAIR).joint
    exchanged = mark(verdict("move_closer", "blue ball", "red cup", direction="together"), PAIR)
    assert exchanged.colour and exchanged.shape and not exchanged.joint
    assert not mark(verdict("move_closer", "red ball"), PAIR).colour


def test_scores_by_hand() -> None:
    verdicts = [
        verdict("push_left_to_right", "red ball", direction="right"),
        verdict("pull_left_to_right", "red ball", direction="right"),
        verdict(None, "red cup", direction="left"),
        verdict("hold", "red ball"),
    ]
    scores = score(verdicts, [PUSH, PUSH, PUSH, Prompt("hold", ("red",), ("ball",))])
    assert scores.valid == Share(4, 4)
    assert scores.action == Share(2, 4)
    assert scores.direction == Share(2, 3)
    assert scores.colour == Share(4, 4)
    assert scores.shape == Share(3, 4)
    assert scores.joint == Share(2, 4)
    assert scores.recall == {"hold": Share(1, 1), "push_left_to_right": Share(1, 3)}
    assert scores.confusion["push_left_to_right"] == {"push_left_to_right": 1, "pull_left_to_right": 1, NOTHING: 1}
    assert scores.action.value == 0.5


def test_nothing_to_count() -> None:
    scores = score([], [])
    assert scores.action == Share(0, 0)
    assert math.isnan(scores.action.value)
    with pytest.raises(ValueError, match="1 verdicts"):
        score([verdict(None)], [])
