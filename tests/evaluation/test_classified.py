"""Actions by a classifier of Something-Something: by logits made by hand, and by the command on a small network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vdm.data.mini_something import write_ssv2
from vdm.evaluation import networks
from vdm.evaluation.catalogue import METRICS
from vdm.evaluation.classified import LABELS, accuracy, confusion, labels_of, pair_accuracy, partners
from vdm.evaluation.clips import Clip, Shape
from vdm.evaluation.extract import Side
from vdm.metrics import videomae
from vdm.metrics.retrieval import normalised
from vdm.metrics.template_pairs import PAIRS
from vdm.metrics.videomae import VideoMae
from vdm.templates import SSV2_TEMPLATES

LEFT, RIGHT = "Pushing [something] from right to left", "Pushing [something] from left to right"
HOLD, PULL = "Holding [something]", "Pulling [something] from left to right"


def label(template: str) -> int:
    return SSV2_TEMPLATES.index(template)


def clip(prompt: str, template: str = "", *, number: int = 0) -> Clip:
    return Clip(f"{number}", Path("x"), prompt, f"{number}", None, template, ())


def side(clips: list[Clip], likely: list[tuple[str, ...]]) -> Side:
    """Clips with logits by which these templates are the likeliest, in this order."""
    rows = np.zeros((len(clips), 174))
    for row, names in zip(rows, likely, strict=True):
        for place, name in enumerate(names):
            row[label(name)] = 9.0 - place
    return Side(tuple(clips), rows)


def test_what_a_prompt_asks_for() -> None:
    reference = side([clip("a man does it", HOLD)], [(HOLD,)])
    prompts = [
        clip("shoving it", RIGHT.replace("[", "").replace("]", "")),
        clip("a man does it"),
        clip("Pushing a red ball from left to right."),
        clip("a dog on the beach"),
    ]
    asked = labels_of(prompts, reference.clips)
    assert asked.tolist() == [label(RIGHT), label(HOLD), label(RIGHT), -1]


def test_accuracies_by_hand() -> None:
    prompts = [clip("pushing a cup from left to right", number=0), clip("holding a cup", number=1), clip("a dog")]
    ours = side(prompts, [(LEFT, RIGHT), (HOLD,), (HOLD,)])
    first, five, pair = accuracy(at=1)(ours, ours), accuracy(at=5)(ours, ours), pair_accuracy()(ours, ours)
    assert np.array_equal(first.values, [0.0, 1.0, math.nan], equal_nan=True) and first.value == 0.5
    assert np.array_equal(five.values, [1.0, 1.0, math.nan], equal_nan=True)
    # Of clip 0 no prompt fits what is seen, of clip 1 one of the two.
    assert first.chance == 0.25
    # Its mirror image is likelier, what it is backwards is not; what holds has no partner.
    assert partners(label(RIGHT)) == tuple(sorted((label(LEFT), label("Pulling [something] from right to left"))))
    assert np.array_equal(pair.values, [0.5, math.nan, math.nan], equal_nan=True) and pair.chance == 0.5
    rows, columns, counts = confusion(ours, ours)
    assert rows == [normalised(HOLD), normalised(RIGHT)] and columns == [normalised(HOLD), normalised(LEFT)]
    assert counts.tolist() == [[1, 0], [0, 1]]


def test_one_that_always_sees_the_same_is_no_better_than_chance() -> None:
    prompts = [clip("pushing a cup from left to right")] * 3 + [clip("holding a cup")]
    ours = side(prompts, [(RIGHT,)] * 4)
    found = accuracy(at=1)(ours, ours)
    assert found.value == found.chance == 0.75


@given(st.integers(0, 173), st.integers(1, 6), st.integers(0, 10**6))
def test_among_the_first_is_what_sorting_says(own: int, at: int, seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal((1, 174))
    prompt = clip("x", SSV2_TEMPLATES[own])
    found = accuracy(at=at)(*[Side((prompt,), logits)] * 2)
    assert found.value == float((logits[0] > logits[0, own]).sum() < at)


def test_every_pair_is_of_templates_and_mutual() -> None:
    assert len(LABELS) == 174
    for one, other in PAIRS:
        assert label(other) in partners(label(one)) and label(one) in partners(label(other))
    assert all(number not in partners(number) for number in range(174))


def test_the_command_judges_by_a_small_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    """Whole, from files to the page; a network that was never trained sees the same in nearly all clips."""
    monkeypatch.setattr(videomae, "VideoMae", lambda: VideoMae(width=24, depth=1, heads=3, hidden=40, patch=4, size=12))
    torch.manual_seed(0)
    state = videomae.VideoMae().state_dict()
    for name in [name for name in state if name.endswith("qkv.bias")]:
        query, _, value = state.pop(name).chunk(3)
        state |= {name.replace("qkv.bias", f"{one}_bias"): bias for one, bias in (("q", query), ("v", value))}
    (tmp_path / "weights").mkdir()
    torch.save({"module": state}, tmp_path / "weights" / videomae.FILE)
    for name, seed in (("ours", 1), ("theirs", 2)):
        write_ssv2(tmp_path / name, num_clips=6, size=32, num_frames=16, fps=8.0, seed=seed)
    captions = (tmp_path / "ours" / "captions.txt").read_text(encoding="utf-8").splitlines()
    files = sorted((tmp_path / "ours" / "20bn-something-something-v2").glob("*.mp4"), key=lambda file: int(file.stem))
    lines = [
        {"file": file.name, "prompt": prompt, "seed": i, "num_frames": 16, "height": 32, "width": 32, "fps": 8.0}
        for i, (file, prompt) in enumerate(zip(files, captions, strict=True))
    ]
    samples = "".join(json.dumps(line) + "\n" for line in lines)
    (files[0].parent / "samples.jsonl").write_text(samples, encoding="utf-8")
    result = command(
        "vdm", "evaluate", "--generated", files[0].parent, "--reference", tmp_path / "theirs", "--output_dir",
        tmp_path / "out", "--weights_dir", tmp_path / "weights", "--metrics",
        "ssv2_action_accuracy,ssv2_action_accuracy_5,ssv2_pair_accuracy,kvd_videomae",
    )  # fmt: skip
    assert result.code == 0, result
    found = {one["metric"]: one for one in json.loads((tmp_path / "out" / "metrics.json").read_text())}
    assert [one["status"] for one in found.values()] == ["ok"] * 4
    first, five = found["ssv2_action_accuracy"], found["ssv2_action_accuracy_5"]
    assert first["n_generated"] == first["n_reference"] == 6 and 0 <= first["value"] <= five["value"] <= 1
    assert {"chance", "reference", "frozen", "shuffled"} <= first["ceilings"].keys()
    assert "Actions of Something-Something" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_one_network_serves_two_extractors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net:
        sha256 = "abc"

        def logits(self, clips: torch.Tensor) -> torch.Tensor:
            return torch.arange(174.0)[None] + clips.float().mean()

        def features(self, clips: torch.Tensor) -> torch.Tensor:
            return clips.float().mean().expand(1, 1408)

    loads = []
    monkeypatch.setattr(networks, "load_videomae", lambda path, device: loads.append(path) or Net())
    networks.release()
    shape = Shape(16, 8.0, 32, 32)
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 32, 32, 3), dtype=np.uint8)
    opened = [one(Path("x"), torch.device("cpu"), shape) for one in (networks.open_ssv2, networks.open_videomae)]
    networks.release()
    assert [one.rows(frames, ["a", "b"]).shape for one in opened] == [(2, 174), (2, 1408)] and len(loads) == 1
    assert [one.protocol["layer"] for one in opened] == ["logits174", "fc_norm1408"]
    assert {METRICS[name].extractor for name in METRICS if name.startswith("ssv2_")} == {"ssv2"}
