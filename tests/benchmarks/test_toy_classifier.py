"""How the toy classifier is trained: variations keep what a clip shows, and the same seed gives the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import toy_classifier as toy
from vdm.cli import run
from vdm.metrics.toy import SHIPPED_SHA256, load_toy_classifier


def test_a_mirror_exchanges_the_four_directions_and_nothing_else() -> None:
    everything = torch.arange(16)
    assert torch.equal(toy.MIRROR[toy.MIRROR], everything)
    changed = [(toy.NAMES[i], toy.NAMES[int(toy.MIRROR[i])]) for i in range(16) if toy.MIRROR[i] != i]
    assert sorted(changed) == [
        ("pull_left_to_right", "pull_right_to_left"),
        ("pull_right_to_left", "pull_left_to_right"),
        ("push_left_to_right", "push_right_to_left"),
        ("push_right_to_left", "push_left_to_right"),
    ]


def test_variations_keep_what_a_clip_shows() -> None:
    clips, labels = toy.render(6, first=0)
    before = clips.clone()
    varied, theirs = toy.vary(clips.repeat(4, 1, 1, 1, 1), labels.repeat(4), np.random.default_rng(0))
    assert varied.dtype == torch.uint8 and varied.shape == (24, *clips.shape[1:]) and torch.equal(clips, before)
    mirrored = 0
    for i, clip in enumerate(varied):
        one, middle = clips[i % 6].double(), (slice(None), slice(8, -8), slice(8, -8))
        straight, turned = ((clip.double() - other)[middle].abs().mean().item() for other in (one, one.flip(2)))
        mirrored += turned < straight
        expected = toy.MIRROR[labels[i % 6]] if turned < straight else labels[i % 6]
        assert theirs[i] == expected
        assert min(straight, turned) < 35
    assert 4 < mirrored < 20
    again, _ = toy.vary(clips, labels, np.random.default_rng(5))
    assert torch.equal(again, toy.vary(clips, labels, np.random.default_rng(5))[0])


def test_scores_by_hand() -> None:
    table = [[0] * 16 for _ in range(16)]
    table[0][0], table[0][1], table[1][1] = 3, 1, 4
    scored = toy.score(table)
    assert scored["accuracy"] == 7 / 8 and scored["clips"] == 8
    assert scored["recall"]["push_left_to_right"] == 0.75 and scored["recall"]["hold"] == 0.0  # type: ignore[index]


def test_the_record_is_that_of_the_shipped_weights() -> None:
    record = json.loads(toy.RESULTS.read_text(encoding="utf-8"))
    assert record["weights_sha256"] == SHIPPED_SHA256
    assert record["held_out"]["accuracy"] >= 0.95


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for seed in (0, 0, 1):
        files = ["--weights", str(tmp_path / "toy.safetensors"), "--json", str(tmp_path / "toy.json")]
        sizes = ["--clips", "64", "--held_out", "4", "--epochs", "1", "--seed", str(seed)]
        monkeypatch.setattr(sys, "argv", ["toy_classifier.py", *sizes, *files])
        assert run(toy.toy_classifier_command) == 0
        record = json.loads((tmp_path / "toy.json").read_text(encoding="utf-8"))
        digests.append(record["weights_sha256"])
        load_toy_classifier(tmp_path / "toy.safetensors", digest=digests[-1])
        assert record["held_out"]["clips"] == 4
    assert digests[0] == digests[1] != digests[2]


def test_bad_input_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, value, least in (("clips", "3", 32), ("epochs", "0", 1), ("held_out", "0", 1), ("seed", "-1", 0)):
        monkeypatch.setattr(sys, "argv", ["toy_classifier.py", f"--{flag}", value])
        assert run(toy.toy_classifier_command) == 2
        assert capsys.readouterr().err == f"error: --{flag} is {value}; it must be at least {least}\n"
