"""The command that measures the judge of actions: its numbers add up, and bad input is a sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.actions import actions_command
from vdm.errors import UserError


def test_a_record_of_a_few_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "actions.json"
    actions_command(["--num_clips", "4", "--size", "64", "--json", str(file)])
    record = json.loads(file.read_text(encoding="utf-8"))
    numbers = record["sizes"]["64"]
    assert numbers["real"]["action"]["clips"] == numbers["metamorphic"]["mirrored"]["clips"] == 4
    assert sum(row["clips"] for row in numbers["recall"].values()) == 4
    assert sum(row["right"] for row in numbers["recall"].values()) == numbers["real"]["action"]["right"]
    assert numbers["without_motion"]["pure noise"]["action"]["right"] == 0
    assert {"noise 8", "blur 1", "jpeg 40", "mp4", "autoencoder"} <= numbers["damaged"].keys()
    assert record["rules_version"] >= 1
    assert "64x64" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--num_clips", "0"], ["--size", "8"], ["--size", "100"], ["--seed", "-1"]])
def test_bad_input(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="must be"):
        actions_command(arguments)
