"""Prompts made for R-precision: known only where templates are, the sets of the metric, and each text read once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from one_layer_clip import make_net
from torch import Tensor

from vdm.evaluation.altered import ALTERATIONS
from vdm.evaluation.candidates import Kind, captions_of, of_templates
from vdm.evaluation.catalogue import METRICS, chosen
from vdm.evaluation.clips import Clip, Shape
from vdm.evaluation.extract import Extracted, Opened, Side
from vdm.evaluation.judging import judged
from vdm.evaluation.matching import key_of
from vdm.evaluation.measures import Median, Unmeasurable
from vdm.evaluation.networks import TEXTS, Texts
from vdm.metrics import clip as clip_metric
from vdm.metrics.retrieval import (
    Caption,
    expected_credit,
    fill_template,
    rp_action,
    rp_object,
    rp_pair,
    similarities,
)

PUSH, PULL = "Pushing [something] from left to right", "Pulling [something] from left to right"
HOLD, COVER = "Holding [something]", "Covering [something] with [something]"
ANNOTATED = [(PUSH, ("a zebra",)), (HOLD, ("a lid",)), (COVER, ("a pen", "a towel")), (PULL, ("a book",))]
SHAPE = Shape(4, 8.0, 32, 32)


def letters(texts: Sequence[str]) -> Tensor:
    """A text tower that counts letters."""
    counts = torch.tensor([[text.count(letter) for letter in "abcdeghilnoprstu"] for text in texts])
    return torch.nn.functional.normalize(counts.double(), dim=-1)


def a_side(prompts: Sequence[str | tuple[str, tuple[str, ...]]], *, seed: int = 0) -> Side:
    """Clips of prompts, or of annotations; their frames look a little like the prompts."""
    clips = []
    for i, prompt in enumerate(prompts):
        template, objects = ("", ()) if isinstance(prompt, str) else prompt
        text = prompt if isinstance(prompt, str) else fill_template(template, objects)
        clips.append(Clip(f"{seed}-{i:03d}", Path("x"), text, f"{i}", None, template, objects))
    texts = letters([clip.prompt for clip in clips])
    noise = torch.randn(texts.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    means = torch.nn.functional.normalize(texts + 0.1 * noise, dim=-1)
    return Side(tuple(clips), torch.cat([means, texts], dim=1).numpy(), letters)


def test_a_prompt_is_known_by_the_references_annotations_or_as_mini_somethings() -> None:
    reference = a_side(ANNOTATED)
    ours = a_side(
        [
            "holding a lid",  # annotated
            "Pushing two  pens from left to right.",  # of an annotated template
            "picking a red ball up",  # mini-something's
            "picking a red dog up",  # of no known template
            "covering a red ball with a white cloth",
            "a dog on the beach",
        ]
    )
    captions, pool = captions_of(ours, reference)
    assert [caption and (caption.template, caption.objects) for caption in captions] == [
        (HOLD, ("a lid",)),
        (PUSH, ("two pens",)),
        ("Picking [something] up", ("a red ball",)),
        None,
        (COVER, ("a red ball", "a white cloth")),
        None,
    ]
    front = ("Holding [something] in front of [something]", ("a cup", "a lid"))
    (caption,), _ = captions_of(a_side(["holding two pens in front of a box"]), a_side([*ANNOTATED, front]))
    assert caption and caption.objects == ("two pens", "a box"), "of two templates that fit the one with more words"
    assert [caption and caption.id for caption in captions][:2] == [key_of(clip) for clip in ours.clips[:2]]
    assert {caption.objects for caption in pool if caption} == {objects for _, objects in ANNOTATED}


@pytest.mark.parametrize("kind", ["action", "object", "pair"])
def test_values_are_those_of_the_metrics_own_sets(kind: Kind) -> None:
    reference, ours = a_side(ANNOTATED), a_side([*ANNOTATED, "pushing a cup from left to right", "a dog"], seed=1)
    measure = of_templates(kind, 0)
    values, chance = measure.values(ours, reference), measure.chance
    assert chance is not None
    pool = [Caption("", "", t, objects) for t, objects in ANNOTATED]
    for i, clip in enumerate(ours.clips):
        if clip.prompt == "a dog" or (kind, clip.template) in (("pair", HOLD), ("pair", COVER), ("object", COVER)):
            assert np.isnan(values[i]) and np.isnan(chance(ours, reference)[i]), "there is nothing to tell it from"
            continue
        template, objects = (clip.template, clip.placeholders) if clip.template else (PUSH, ("a cup",))
        caption = Caption(key_of(clip), clip.prompt, template, objects)
        sets = {
            "action": lambda c=caption: [rp_action(c)],
            "object": lambda c=caption: [rp_object(c, pool, seed=0)],
            "pair": lambda c=caption: rp_pair(c),
        }[kind]()
        frames = torch.from_numpy(ours.rows[i, :16])[None, None].expand(len(sets), -1, -1)
        scores = similarities(frames, sets, texts=letters)
        assert values[i] == pytest.approx(np.mean([expected_credit(one, at=1) for one in scores]))
        assert chance(ours, reference)[i] == pytest.approx(np.mean([1 / len(one) for one in sets]))
    found = measure(ours, reference)
    assert found.value == pytest.approx(np.nanmean(values)) and found.count == np.isfinite(values).sum()
    assert found.chance == pytest.approx(np.nanmean(chance(ours, reference)))
    order = np.random.default_rng(0).permutation(len(ours.clips))
    mixed = measure.values(ours.part(order.tolist()), reference.part([3, 1, 0, 2]))
    assert np.array_equal(mixed, values[order], equal_nan=True)


def test_why_there_is_no_value() -> None:
    plain = a_side(["a dog", "a cat"])
    with pytest.raises(Unmeasurable, match="needs prompts made of templates, which the reference's annotations name"):
        of_templates("action", 0)(plain, plain)
    alone = a_side([(HOLD, ("a lid",))])
    with pytest.raises(Unmeasurable, match="no second prompt whose objects"):
        of_templates("object", 0)(alone, alone)
    with pytest.raises(Unmeasurable, match="has a look-alike"):
        of_templates("pair", 0)(alone, alone)
    opened = Opened(lambda frames, prompts: plain.rows, texts=letters)
    both = Extracted(plain.clips, (), {(look, "clip"): plain.rows for look in ("", *ALTERATIONS)})
    for metric in chosen(["rp_action", "rp_object", "rp_pair"]):
        record = judged(metric, opened, both, both, base={}).record
        assert record.value is None and record.status.startswith("skipped: needs prompts made of templates")


def test_a_record_says_what_chance_would_give_and_what_the_reference_has() -> None:
    padded = np.zeros((4, 3))
    one, other = a_side(ANNOTATED, seed=3), a_side(ANNOTATED)
    looks = [(look, "clip") for look in ("", *ALTERATIONS)]
    ours, theirs = (
        Extracted(s.clips, (), dict.fromkeys(looks, np.concatenate([padded, s.rows], axis=1))) for s in (one, other)
    )
    (metric,) = chosen(["rp_pair"])
    record = judged(metric, Opened(lambda frames, prompts: padded, texts=letters), ours, theirs, base={}).record
    assert record.ok and record.ceilings["chance"] == 0.5 and record.n_generated == 2
    assert {"chance", "reference", "frozen", "shuffled", "noise"} == set(record.ceilings)
    assert "mirror image" in str(record.protocol["candidates"])


def test_the_median_rank_is_that_of_the_hundred() -> None:
    measure = METRICS["r_precision_median_rank"].measure
    assert isinstance(measure, Median)
    rng = np.random.default_rng(0)
    prompts = [f"prompt {i}" for i in range(150)]
    texts = np.eye(150)
    means = np.eye(150) + 1e-3 * rng.random((150, 150))
    means[:60] = 1.0  # level with all others
    clips = tuple(Clip(f"{i:03d}", Path("x"), text, text) for i, text in enumerate(prompts))
    rows = np.concatenate([np.zeros((150, 3)), means, texts], axis=1)
    found = measure(Side(clips, rows), Side(clips, rows))
    assert (found.value, found.count, found.values) == (1.0, 150, None)
    assert found.interval() == (1.0, 1.0), "90 of 150 are first"
    level = measure(Side(clips[:60], rows[:60]), Side(clips, rows))
    assert level.value == 50.5 and level.interval() == (50.5, 50.5)


def test_each_text_is_read_once_and_none_depends_on_the_others() -> None:
    net = make_net()
    clip = clip_metric.Clip(net, "abc", "crop", torch.device("cpu"))
    passes: list[int] = []
    net.net.token_embedding.register_forward_hook(lambda module, given, out: passes.append(len(given[0])))
    texts = Texts(clip)
    many = [f"a {i} cup" for i in range(TEXTS + 3)]
    found = texts([*many, *many[:5]])
    assert found.shape == (TEXTS + 8, 24) and torch.equal(found[TEXTS + 3 :], found[:5])
    assert passes == [TEXTS, TEXTS]
    assert torch.equal(texts(many[::-1]), found[: len(many)].flip(0)) and len(passes) == 2
    assert torch.equal(Texts(clip)(many[-1:])[0], found[TEXTS + 2]), "alone as among others"
    assert torch.allclose(found[0], clip.texts(many[:1])[0], atol=1e-6)
