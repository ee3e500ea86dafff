"""The caption rule, on made-up templates and on real Something-Something-style annotations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vdm.data.captions import caption
from vdm.errors import UserError


def test_slots_are_filled_in_order_and_lowered() -> None:
    assert caption("Moving [something] and [Something] closer", ["A red Ball", "a box"]) == (
        "moving a red ball and a box closer"
    )


def test_a_slot_may_hold_any_words() -> None:
    assert caption("Taking [one of many similar things on the table]", ["book"]) == "taking book"


def test_a_placeholder_is_taken_literally() -> None:
    assert caption("Poking [something] near [something]", [r"\1 [x]", "a cup"]) == r"poking \1 [x] near a cup"


@pytest.mark.parametrize("placeholders", [[], ["a", "b"]])
def test_wrong_count_is_refused(placeholders: list[str]) -> None:
    with pytest.raises(UserError, match=r"Holding \[something\].*1 slots but . placeholders.*give one"):
        caption("Holding [something]", placeholders)


def test_real_annotations_obey_the_rule(clips_dir: Path) -> None:
    entries = json.loads((clips_dir / "annotations.json").read_text(encoding="utf-8"))
    assert len(entries) == 12
    for entry in entries:
        assert caption(entry["template"], entry["placeholders"]) == entry["label"]
