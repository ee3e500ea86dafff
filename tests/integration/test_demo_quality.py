"""The shipped model does what prompts say: no change to the code may break it unseen."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import demo
from vdm.pipeline import TextToVideo


@pytest.mark.slow
def test_what_48_prompts_ask_for_is_shown() -> None:
    """In 10 steps it showed 36 actions, all 33 directions and 48 colours, and 32 shapes when these bounds were set."""
    options = argparse.Namespace(
        clips_per_action=3, steps=10, sampler="dpmpp", guidance_scale=None, seed=0, other_words=False
    )
    scores = demo.judge_generated(TextToVideo.from_pretrained(), options)
    assert scores["action"]["right"] >= 32
    assert scores["direction"]["right"] >= 31
    assert scores["colour"]["right"] >= 46
    assert scores["shape"]["right"] >= 28
