"""Prompts understood, verdicts kept as rows, and clips matched with prompts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from folders import side
from hypothesis import given
from hypothesis import strategies as st

from vdm.data.captions import caption
from vdm.data.mini_something import render_clip
from vdm.data.phrasing import num_forms, rephrased
from vdm.evaluation import verdicts
from vdm.evaluation.extract import Side
from vdm.evaluation.matching import r_precision, r_precision_rank, template_of
from vdm.evaluation.measures import Unmeasurable
from vdm.evaluation.verdicts import asked
from vdm.metrics.actions import Verdict
from vdm.metrics.retrieval import retrieval
from vdm.templates import SSV2_TEMPLATES
from vdm.vocabulary import ACTIONS, COLOURS, COVER, SHAPES


@given(st.sampled_from(ACTIONS), st.data())
def test_a_prompt_is_understood_in_every_wording(action, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    count = 1 if action.name == "cover" else action.num_slots
    colours = tuple(data.draw(st.sampled_from(list(COLOURS))) for _ in range(count))
    shapes = tuple(data.draw(st.sampled_from(SHAPES)) for _ in range(count))
    article = data.draw(st.sampled_from(("", "a ")))
    things = [f"{article}{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True)]
    things += [COVER] if action.name == "cover" else []
    wordings = [
        caption(action.template, things),
        *(rephrased(action.template, things, form=f) for f in range(num_forms(action.template))),
    ]
    for words in (*wordings, f"  {wordings[0].capitalize()}. "):
        found = asked(words)
        assert found is not None and (found.action, found.colours, found.shapes) == (action.name, colours, shapes)


@pytest.mark.parametrize("prompt", ["", "a red ball", "pushing a red dog from left to right", "holding a pen"])
def test_other_prompts_ask_for_nothing(prompt: str) -> None:
    assert asked(prompt) is None


def test_what_is_rendered_is_what_is_asked_for() -> None:
    for index in range(40):
        clip = render_clip(index, seed=3, height=16, width=16, num_frames=2, fps=8.0)
        found = asked(clip.label)
        assert found is not None and (found.action, found.colours, found.shapes) == (
            clip.action,
            clip.colours,
            clip.shapes,
        )


@given(
    st.none() | st.sampled_from(verdicts.NAMES),
    st.none() | st.sampled_from(verdicts.WAYS),
    st.lists(st.tuples(st.sampled_from(verdicts.HUES), st.sampled_from(SHAPES)), max_size=2),
    st.sets(st.sampled_from(verdicts.HUES)),
)
def test_a_verdict_survives_its_row(action, way, things, found) -> None:  # type: ignore[no-untyped-def]
    colours, shapes = tuple(hue for hue, _ in things), tuple(form for _, form in things)
    seen = Verdict(action, way, colours, shapes, tuple(hue for hue in verdicts.HUES if hue in found))
    assert verdicts.decoded(verdicts.encoded(seen)) == seen


def test_scores_of_verdicts() -> None:
    seen = Verdict("move_apart", "apart", ("blue", "red"), ("cup", "ball"), ("blue", "red", "green"))
    prompts = [
        "moving a red ball and a blue cup away from each other",
        "moving a red ball and a blue cup closer to each other",
        "holding a green box",
        "a dog on the beach",
    ]
    rows = side([verdicts.encoded(seen).tolist()] * 4, prompts)
    for name, values in {
        "valid": [1, 1, 1],
        "action": [1, 0, 0],
        "direction": [1, 0, math.nan],
        "colour": [1, 1, 0],
        "shape": [1, 1, 0],
        "joint": [1, 0, 0],
    }.items():
        found = verdicts.marked(name)(rows, rows)  # type: ignore[arg-type]
        assert np.array_equal(found.values, [*values, math.nan], equal_nan=True), name
        assert found.count == np.isfinite(values).sum() and found.value == np.nanmean(values)
    names, columns, counts = verdicts.confusion(rows)
    assert counts.sum() == 3 and columns == (*names, "none")
    assert counts[names.index("hold"), columns.index("move_apart")] == 1
    nothing = verdicts.confusion(side([verdicts.encoded(Verdict(None, None, (), (), ())).tolist()], prompts[:1]))[2]
    assert nothing[names.index("move_apart"), -1] == 1


def test_a_template_is_found_again_in_its_captions() -> None:
    lost = [t for t in SSV2_TEMPLATES if template_of(caption(t, ["a red zebra"] * t.count("["))) != t]
    # Two templates that differ in the words of their slots alone make the same captions.
    same = [t for t in lost if template_of(caption(t, ["x"] * t.count("["))).count("[") == t.count("[")]
    assert lost == same and len(lost) <= 8, lost
    assert template_of("something else") == "something else"


def _ranks(clips: Side, reference: Side) -> np.ndarray:
    return r_precision_rank(0)(clips, reference)


def test_r_precision_is_that_of_all_candidates() -> None:
    rng = np.random.default_rng(0)
    prompts = [caption(template, ["a cup"] * template.count("[")) for template in SSV2_TEMPLATES[:150]]
    texts, means = rng.normal(size=(150, 6)), rng.normal(size=(150, 6))
    means[:50] = texts[:50]  # these find their own
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    rows = side(np.concatenate([means, texts], axis=1).tolist(), prompts)
    values = r_precision(0, at=1).values(rows, rows)
    assert values[:50].tolist() == [1.0] * 50 and 0.0 <= values[50:].mean() < 0.1
    alike = side(np.concatenate([means, np.ones((150, 6))], axis=1).tolist(), prompts)
    assert np.allclose(r_precision(0, at=1).values(alike, alike), 0.01) and np.allclose(
        r_precision(0, at=5).values(alike, alike), 0.05
    )
    order = rng.permutation(150)
    mixed = Side(tuple(rows.clips[i] for i in order), rows.rows[order])
    assert np.array_equal(r_precision(0, at=1).values(mixed, rows), values[order])
    few = side(rows.rows[:3].tolist(), prompts[:3])
    assert np.array_equal(r_precision(0, at=1).values(few, rows), values[:3]), (
        "the other side's prompts are there to choose from"
    )
    renamed = tuple(replace(clip, id=f"x{clip.id}") for clip in rows.clips[50:100])
    part = Side(renamed, rows.rows[50:100])
    assert np.array_equal(_ranks(part, rows), _ranks(rows, rows)[50:100]), "neither names nor other clips matter"
    again = Side(tuple(replace(clip, seed=1) for clip in renamed), part.rows)
    assert not np.array_equal(_ranks(again, rows), _ranks(part, rows)), "but the seed does"
    strangers = side(rng.normal(size=(50, 12)).tolist(), [f"stranger {i}" for i in range(50)])
    both = Side((*part.clips, *strangers.clips), np.concatenate([part.rows, strangers.rows]))
    assert np.array_equal(_ranks(both, rows)[:50], _ranks(part, rows)), "nor other prompts of the run"
    with pytest.raises(Unmeasurable, match="needs 99 prompts of other templates"):
        r_precision(0, at=1).values(few, few)
    assert retrieval([torch.tensor([1.0, 0.5])]).recall[1] == 1.0
