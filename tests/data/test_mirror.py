"""Left and right in captions: which templates a mirror turns, and words that only look like sides."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdm.data.captions import SLOT, caption
from vdm.data.mirror import TURNED, UNTURNED, mirrored, swap_sides
from vdm.data.phrasing import num_forms, rephrased
from vdm.templates import SSV2_TEMPLATES
from vdm.vocabulary import ACTIONS

BY_NUMBER = {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}  # the label map of action recognition


def fillers(template: str) -> list[str]:
    return [f"thing{i}" for i in range(len(SLOT.findall(template)))]


def test_there_are_174_templates_in_the_order_of_labels_json() -> None:
    names = [re.sub(r"[\[\]]", "", template) for template in SSV2_TEMPLATES]
    assert len(set(names)) == 174 and names == sorted(names)
    assert names[0] == "Approaching something with your camera" and names[173] == "Wiping something off of something"
    assert {action.template for action in ACTIONS} - set(SSV2_TEMPLATES) == set()


@pytest.mark.parametrize("number", range(174))
def test_every_template_has_its_rule(number: int) -> None:
    template = SSV2_TEMPLATES[number]
    text = caption(template, fillers(template))
    found = mirrored(text, template=template, placeholders=fillers(template))
    other = SSV2_TEMPLATES[BY_NUMBER.get(number, number)]
    assert found == caption(other, fillers(other))
    assert (template in TURNED) == (number in BY_NUMBER) == (template not in UNTURNED)
    for form in range(num_forms(template)):  # other words for it too
        words = rephrased(template, fillers(template), form=form)
        assert mirrored(words, template=template) == rephrased(other, fillers(other), form=form)


@pytest.mark.parametrize(
    ("text", "template", "placeholders", "expected"),
    [
        ("plugging a cable into a phone but pulling it right out as you remove your hand", SSV2_TEMPLATES[50],
         ["a cable", "a phone"], "plugging a cable into a phone but pulling it right out as you remove your hand"),
        ("a wheel spins Clockwise", "", [], None),
        ("turning a key anti-clockwise, from left to right", "", [], None),
        ("putting a cup upright on the table", SSV2_TEMPLATES[119], ["a cup"], "putting a cup upright on the table"),
        ("pushing pushing spray from right to left from right to left", SSV2_TEMPLATES[94],
         ["pushing spray from right to left"], None),
        ("moving left foot and right foot so they collide with each other", SSV2_TEMPLATES[38],
         ["left foot", "right foot"], None),
        ("pushing Left-handed scissors from left to right", SSV2_TEMPLATES[93], ["Left-handed scissors"], None),
        ("pushing a cup from Left to RIGHT, left to right", SSV2_TEMPLATES[93], ["a cup"],
         "pushing a cup from Right to LEFT, right to left"),
        # captions without a template
        ("a dog runs", "", [], "a dog runs"),
        ("a dog runs from left to right", "", [], "a dog runs from right to left"),
        ("a dog runs from the right side to the left", "", [], "a dog runs from the left side to the right"),
        ("she turns to her left", "", [], "she turns to her right"),
        ("a dog runs rightwards", "", [], "a dog runs leftwards"),
        ("the bright bird stands upright", "", [], "the bright bird stands upright"),
        ("he pulls it right out", "", [], None),
        ("what is left of the cake", "", [], None),
        ("his right hand moves from left to right", "", [], None),
    ],
)  # fmt: skip
def test_words_that_are_sides_and_words_that_are_not(
    text: str, template: str, placeholders: list[str], expected: str | None
) -> None:
    assert mirrored(text, template=template, placeholders=placeholders) == expected


@given(st.lists(st.sampled_from(["left", "Right", "LEFT", "upright", "a", "ball", "leftwards", "bright", "to"])))
def test_the_mirror_of_a_mirror_is_the_text(words: list[str]) -> None:
    text = " ".join(words)
    assert swap_sides(swap_sides(text)) == text
    once = mirrored(text)
    assert once is None or mirrored(once) == text
