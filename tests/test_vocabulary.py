"""The vocabulary is what DESIGN says: sixteen templates to the letter, six colours that no pixel can confuse."""

from __future__ import annotations

from vdm.errors import UserError, nearest
from vdm.vocabulary import ACTIONS, COLOURS, HAND_HUES, SHAPES, SHAPES_WITH_A_TOP

TEMPLATES = [
    "Pushing [something] from left to right",
    "Pushing [something] from right to left",
    "Pulling [something] from left to right",
    "Pulling [something] from right to left",
    "Picking [something] up",
    "Moving [something] down",
    "Putting [something] on a surface",
    "Moving [something] towards the camera",
    "Moving [something] away from the camera",
    "Turning [something] upside down",
    "Pushing [something] so that it falls off the table",
    "Covering [something] with [something]",
    "Moving [something] and [something] closer to each other",
    "Moving [something] and [something] away from each other",
    "Throwing [something] in the air and catching it",
    "Holding [something]",
]


def test_templates_are_in_the_agreed_order() -> None:
    assert [action.template for action in ACTIONS] == TEMPLATES
    assert len({action.name for action in ACTIONS}) == 16


def test_slots_and_class_names() -> None:
    assert [action.num_slots for action in ACTIONS] == [1] * 11 + [2] * 3 + [1] * 2
    assert ACTIONS[11].class_name == "Covering something with something"


def test_no_hue_belongs_to_two_things() -> None:
    ranges = [hues for colour in COLOURS.values() for hues in colour.hues] + [HAND_HUES]
    owned = [hue for low, high in ranges for hue in range(low, high + 1)]
    assert len(owned) == len(set(owned)) and set(owned) <= set(range(180))
    assert list(COLOURS) == [colour.name for colour in COLOURS.values()]


def test_shapes_with_a_top_are_shapes() -> None:
    assert set(SHAPES_WITH_A_TOP) < set(SHAPES)


def test_nearest_name() -> None:
    assert nearest("learnig_rate", ["learning_rate", "seed"]) == "learning_rate"
    assert nearest("zzz", ["learning_rate", "seed"]) == ""
    assert issubclass(UserError, ValueError)
