"""Whether a classifier of Something-Something V2 sees in a clip the action that its prompt asks for.

Rows are logits of the 174 templates. A prompt asks for the template that the annotations name, or that it fills with
words; clips of other prompts do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from vdm.evaluation.clips import Clip
from vdm.evaluation.extract import Side
from vdm.evaluation.matching import template_of
from vdm.evaluation.measures import PerClip, Values
from vdm.metrics.retrieval import normalised
from vdm.metrics.template_pairs import PAIRS
from vdm.templates import SSV2_TEMPLATES

# In the order of the data set's labels.json, in which published classifiers have them.
LABELS = {normalised(template): label for label, template in enumerate(SSV2_TEMPLATES)}


def accuracy(*, at: int) -> PerClip:
    """The share of clips whose own template is among the `at` that the classifier finds likeliest.

    By chance: the share with the prompts of all clips in place of the own, so that one kind of clip that looks like a
    frequent prompt gains nothing.
    """

    def values(side: Side, reference: Side) -> Values:
        labels = labels_of(side.clips, reference.clips)
        return np.where(labels < 0, np.nan, _hits(side, at=at)[np.arange(len(labels)), labels])

    def with_others(side: Side, reference: Side) -> Values:
        labels = labels_of(side.clips, reference.clips)
        return _hits(side, at=at)[:, labels[labels >= 0]].mean(1)

    return PerClip(values, share=True, chance=with_others)


def pair_accuracy() -> PerClip:
    """The share of clips whose own template is found likelier than its mirror image, its reverse or its pretence; the
    mean over those that a template has. One without any does not count."""

    def values(side: Side, reference: Side) -> Values:
        return np.array(
            [
                np.mean([_before(row[label], row[other]) for other in partners(int(label))])
                if label >= 0 and partners(int(label))
                else np.nan
                for label, row in zip(labels_of(side.clips, reference.clips), side.rows, strict=True)
            ]
        )

    def half(side: Side, reference: Side) -> Values:
        return np.full(len(side.clips), 0.5)

    return PerClip(values, chance=half)


def _before(own: float, other: float) -> float:
    return float(own > other) + 0.5 * float(own == other)


@cache
def partners(label: int) -> tuple[int, ...]:
    """The labels of what a template may be taken for."""
    pairs = [tuple(LABELS[normalised(name)] for name in pair) for pair in PAIRS]
    return tuple(sorted({other for pair in pairs if label in pair for other in pair if other != label}))


def _hits(side: Side, *, at: int) -> np.ndarray:
    """(N,174), whether each template is among the likeliest: 1.0, or 0.0; of equals those that the list has first."""
    order = np.argsort(-side.rows, axis=1, kind="stable")[:, :at]
    hits = np.zeros(side.rows.shape)
    np.put_along_axis(hits, order, 1.0, axis=1)
    return hits


def labels_of(clips: Sequence[Clip], reference: Sequence[Clip]) -> np.ndarray:
    """(N,) the label that each clip's prompt asks for, -1 where it is none of them."""
    known = {clip.prompt: clip.template for clip in reference if clip.template}
    templates = (clip.template or known.get(clip.prompt) or template_of(clip.prompt) for clip in clips)
    return np.array([LABELS.get(normalised(template), -1) for template in templates], dtype=np.int64)


def confusion(side: Side, reference: Side) -> tuple[Sequence[str], Sequence[str], np.ndarray]:
    """The templates asked for (rows), those seen (columns), and how often: (R,C); none that did not occur."""
    labels = labels_of(side.clips, reference.clips)
    seen = side.rows.argmax(1) if len(side.clips) else np.empty(0, np.int64)
    rows, columns = (sorted(set(some[labels >= 0].tolist())) for some in (labels, seen))
    counts = np.zeros((len(rows), len(columns)), dtype=np.int64)
    for asked, found in zip(labels, seen, strict=True):
        if asked >= 0:
            counts[rows.index(asked), columns.index(found)] += 1
    names = [normalised(template) for template in SSV2_TEMPLATES]
    return [names[label] for label in rows], [names[label] for label in columns], counts
