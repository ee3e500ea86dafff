"""R-precision with prompts that are made for it: the same objects in other actions, other objects, look-alikes.

They can be made only where a prompt is known to be a template with its slots filled: one that the reference's
annotations name, or one of mini-something's. Other clips do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from vdm.data.captions import SLOT
from vdm.evaluation.extract import Side
from vdm.evaluation.matching import OTHERS, key_of, pattern
from vdm.evaluation.measures import SEED, PerClip, Unmeasurable, Values
from vdm.evaluation.verdicts import asked
from vdm.metrics.retrieval import (
    Caption,
    expected_credit,
    normalised,
    rp_action,
    rp_object,
    rp_pair,
    similarities,
)
from vdm.vocabulary import ACTIONS

Kind = Literal["action", "object", "pair"]
Sets = tuple[tuple[str, ...], ...]  # candidate sets of one clip, each with the own prompt first
Captions = tuple[Caption | None, ...]
WITHOUT = {
    "action": "no template has as many slots as that of any prompt",
    "object": "there is no second prompt whose objects could be in the place of any",
    "pair": "the template of no prompt has a look-alike",
}


def of_templates(kind: Kind, first: int) -> PerClip:
    """The share of clips that match their own prompt best: in part where it is so by lot, or in one set of several.

    Rows hold, from column `first` on, the unit vectors of the mean frame and of the prompt.
    """

    def values(side: Side, reference: Side) -> Values:
        sets = _sets(kind, side, reference)
        means = np.split(side.rows[:, first:], 2, axis=1)[0]
        assert side.texts is not None, "these rows come with their texts"
        owners = [i for i, own in enumerate(sets) for _ in own]
        frames = torch.from_numpy(means[owners])[:, None]  # (n,1,D), one for each set
        scores = similarities(frames, [texts for own in sets for texts in own], texts=side.texts)
        return _means(len(sets), owners, [expected_credit(one, at=1) for one in scores])

    def by_lot(side: Side, reference: Side) -> Values:
        sets = _sets(kind, side, reference)
        owners = [i for i, own in enumerate(sets) for _ in own]
        return _means(len(sets), owners, [1 / len(texts) for own in sets for texts in own])

    return PerClip(values, share=True, chance=by_lot)


def _means(count: int, owners: Sequence[int], values: Sequence[float]) -> Values:
    """(count,) of the values of each owner; NaN where it has none."""
    sums, numbers = np.bincount(owners, values, count), np.bincount(owners, minlength=count)
    return np.divide(sums, numbers, out=np.full(count, np.nan), where=numbers > 0)


def _sets(kind: Kind, side: Side, reference: Side) -> list[Sets]:
    """The candidate sets of each clip, none where there is nothing to tell its prompt from. Raises Unmeasurable."""
    ours, theirs = captions_of(side, reference)
    if not any(ours):
        raise Unmeasurable(
            "needs prompts made of templates, which the reference's annotations name (template and placeholders), or "
            "mini-something's; there are none"
        )
    sets = _made(kind, ours, theirs)
    if not any(sets):
        raise Unmeasurable(WITHOUT[kind])
    return sets


@lru_cache(maxsize=16)  # all looks at the reference ask for the same sets, and so does what is by chance
def _made(kind: Kind, ours: Captions, theirs: Captions) -> list[Sets]:
    pool = [caption for caption in theirs if caption is not None]
    return [() if caption is None else tuple(_of_caption(kind, caption, pool)) for caption in ours]


def _of_caption(kind: Kind, caption: Caption, pool: Sequence[Caption]) -> Iterator[tuple[str, ...]]:
    if kind == "pair":
        sets = rp_pair(caption)
    elif kind == "action":
        sets = [rp_action(caption)]
    else:
        sets = [rp_object(caption, pool, seed=SEED, num=OTHERS)]
    return (tuple(texts) for texts in sets if len(texts) > 1)


def captions_of(side: Side, reference: Side) -> tuple[Captions, Captions]:
    """A caption for each clip of a side, None where its prompt is not known to fill a template; and, in an order that
    means nothing, those of the reference, of which each object is there once."""
    clips = [clip for one in (reference, side) for clip in one.clips]
    annotated = {clip.prompt: (clip.template, clip.placeholders) for clip in clips if clip.placeholders}
    templates = tuple(sorted({template for template, _ in annotated.values()}))

    def caption(name: str, prompt: str) -> Caption | None:
        found = annotated.get(prompt) or _read(prompt, templates)
        return found and Caption(name, prompt, *found)

    # A caption's name and text are not looked at in the pool, only its objects.
    pool = {
        found.objects: found
        for prompt in sorted({clip.prompt for clip in reference.clips})
        if (found := caption("", prompt))
    }
    return tuple(caption(key_of(clip), clip.prompt) for clip in side.clips), tuple(pool.values())


@lru_cache(maxsize=1 << 14)
def _read(prompt: str, templates: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """The template that a prompt fills, the one with most words of its own, and its objects."""
    ours = tuple(action.template for action in ACTIONS) if asked(prompt) else ()
    for template in sorted({*templates, *ours}, key=lambda one: (-len(SLOT.sub("", one)), one)):
        if found := pattern(template).fullmatch(normalised(prompt)):
            return template, found.groups()
    return None
