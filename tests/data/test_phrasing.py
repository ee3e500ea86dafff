"""Templates in natural words: articles, and verbs that agree."""

from __future__ import annotations

import re

import pytest

from vdm.data.captions import SLOT
from vdm.data.phrasing import NUM_FORMS, num_forms, rephrased, with_article
from vdm.errors import UserError
from vdm.templates import SSV2_TEMPLATES


@pytest.mark.parametrize(
    ("template", "placeholders", "forms"),
    [
        ("Pushing [something] from left to right", ["red ball"],
         ["a person pushes a red ball from left to right", "push a red ball from left to right",
          "someone is pushing a red ball from left to right", "pushing a red ball from left to right"]),
        ("Throwing [something] in the air and catching it", ["apple"],
         ["a person throws an apple in the air and catches it", "throw an apple in the air and catch it",
          "someone is throwing an apple in the air and catching it", "throwing an apple in the air and catching it"]),
        ("Approaching [something] with your camera", ["the door"],
         ["a person approaches the door with their camera", "approach the door with your camera",
          "someone is approaching the door with their camera", "approaching the door with your camera"]),
        ("Pretending or trying and failing to twist [something]", ["scissors"],
         ["a person pretends or tries and fails to twist scissors", "pretend or try and fail to twist scissors",
          "someone is pretending or trying and failing to twist scissors",
          "pretending or trying and failing to twist scissors"]),
        ("[Something] falling like a rock", ["pillow"],
         ["a pillow is falling like a rock"] * 3 + ["a pillow falling like a rock"]),
        ("Stacking [number of] [something]", ["3", "tin cans"],
         ["a person stacks 3 tin cans", "stack 3 tin cans", "someone is stacking 3 tin cans", "stacking 3 tin cans"]),
        ("Moving [part] of [something]", ["lid", "jar"],
         ["a person moves the lid of a jar", "move the lid of a jar", "someone is moving the lid of a jar",
          "moving the lid of a jar"]),
        ("Lifting up one end of [something], then letting it drop down", ["Book"],
         ["a person lifts up one end of a book, then lets it drop down",
          "lift up one end of a book, then let it drop down",
          "someone is lifting up one end of a book, then letting it drop down",
          "lifting up one end of a book, then letting it drop down"]),
        ("Twisting (wringing) [something] wet until water comes out", ["sponge"],
         ["a person twists (wrings) a sponge wet until water comes out",
          "twist (wring) a sponge wet until water comes out",
          "someone is twisting (wringing) a sponge wet until water comes out",
          "twisting (wringing) a sponge wet until water comes out"]),
        ("Pulling two ends of [something] but nothing happens", ["rope"],
         ["a person pulls two ends of rope but nothing happens", "pull two ends of rope but nothing happens",
          "someone is pulling two ends of rope but nothing happens", "pulling two ends of rope but nothing happens"]),
        ("Plugging [something] into [something] but pulling it right out as you remove your hand", ["plug", "socket"],
         ["a person plugs a plug into a socket but pulls it right out as they remove their hand",
          "plug a plug into a socket but pull it right out as you remove your hand",
          "someone is plugging a plug into a socket but pulling it right out as they remove their hand",
          "plugging a plug into a socket but pulling it right out as you remove your hand"]),
        ("Putting [something] and [something] on the table", ["knife", "rolling pin"],
         ["a person puts a knife and a rolling pin on the table", "put a knife and a rolling pin on the table",
          "someone is putting a knife and a rolling pin on the table",
          "putting a knife and a rolling pin on the table"]),
    ],
)  # fmt: skip
def test_forms(template: str, placeholders: list[str], forms: list[str]) -> None:
    assert [rephrased(template, placeholders, form=form) for form in range(NUM_FORMS)] == forms


@pytest.mark.parametrize("template", SSV2_TEMPLATES)
def test_every_template_has_all_forms(template: str) -> None:
    fillers = ["ball"] * len(SLOT.findall(template))
    for form in range(num_forms(template)):
        text = rephrased(template, fillers, form=form)
        assert "[" not in text and text == text.lower() and "  " not in text
    for wording in range(0, num_forms(template), NUM_FORMS):
        third = rephrased(template, fillers, form=wording)
        assert third.startswith("a person ") or template.startswith("[Something]")
        # No verb is left that does not agree with its person.
        assert not re.search(r"(^a person|\b(and|but|or|then)) (?!nothing\b)[a-z]+ing\b", third) or template.startswith(
            "[Something]"
        )
        assert not re.match(
            r"(?!bring\b)[a-z]+ing\b", rephrased(template, fillers, form=wording + 1)
        ) or template.startswith("[")


def test_other_words_are_those_of_the_action() -> None:
    said = [rephrased("Pulling [something] from left to right", ["a box"], form=form) for form in (0, 4, 8, 13)]
    assert said == [
        "a person pulls a box from left to right",
        "a person pulls a box to the right",
        "a person drags a box to the right",
        "drag a box from left to right",
    ]
    assert num_forms("Pouring [something] into [something]") == NUM_FORMS


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ball", "a ball"), ("orange", "an orange"), ("umbrella", "an umbrella"), ("usb stick", "a usb stick"),
        ("unit", "a unit"), ("hourglass", "an hourglass"), ("a cup", "a cup"), ("my hand", "my hand"),
        ("2 pens", "2 pens"), ("pens", "pens"), ("glass", "a glass"), ("bus", "a bus"), ("water", "water"),
        ("sheet of paper", "sheet of paper"),
        ("something", "something"), ("", ""),
    ],
)  # fmt: skip
def test_articles(words: str, expected: str) -> None:
    assert with_article(words) == expected


def test_the_wrong_number_of_placeholders_is_refused() -> None:
    with pytest.raises(UserError, match="has 1 slots but 2 placeholders"):
        rephrased("Holding [something]", ["a", "b"], form=0)
