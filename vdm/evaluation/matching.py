"""R-precision of the rows that CLIP leaves: is a clip nearer to its own prompt than to 99 of other templates?"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
import torch

from vdm.data.captions import SLOT
from vdm.errors import UserError
from vdm.evaluation.clips import Clip
from vdm.evaluation.extract import Rows, Side
from vdm.evaluation.measures import SEED, PerClip, Unmeasurable, Values
from vdm.evaluation.records import digest
from vdm.metrics.retrieval import Caption, expected_credit, expected_rank, rp100
from vdm.templates import SSV2_TEMPLATES

OTHERS = 99
Captions = tuple[Caption, ...]


def r_precision(first: int, *, at: int) -> PerClip:
    """The share of clips whose own prompt is among the best `at`, counted in part where it is so by lot.

    Rows hold, from column `first` on, the unit vectors of the mean frame and of the prompt. Prompts to choose from are
    the reference's, so that a clip's do not depend on the others that are evaluated.
    """

    def by_lot(side: Side, reference: Side) -> Values:
        return np.full(len(side.clips), at / (1 + OTHERS))

    return PerClip(_of_scores(first, lambda scores: expected_credit(scores, at=at)), share=True, chance=by_lot)


def r_precision_rank(first: int) -> Callable[[Side, Side], Values]:
    """The own prompt's place among the same prompts, from 1: (N,)."""
    return _of_scores(first, expected_rank)


def _of_scores(first: int, function: Callable[[torch.Tensor], float]) -> Callable[[Side, Side], Values]:
    """A function of the scores (100,) of each clip's prompts, the own first."""

    def values(side: Side, reference: Side) -> Values:
        vectors: dict[str, Rows] = {}
        for one in (reference, side):
            texts = np.split(one.rows[:, first:], 2, axis=1)[1]
            vectors |= {clip.prompt: text for clip, text in zip(one.clips, texts, strict=True)}
        pool = {clip.prompt: _caption(clip.prompt, clip.template, "") for clip in reference.clips}
        templates = {prompt: caption.template for prompt, caption in pool.items()}
        captions = tuple(
            _caption(clip.prompt, clip.template or templates.get(clip.prompt, ""), key_of(clip)) for clip in side.clips
        )
        means = np.split(side.rows[:, first:], 2, axis=1)[0]
        sets = _candidates(captions, tuple(pool[prompt] for prompt in sorted(pool)))
        # Not a matrix product, which may round equal rows differently: ties must stay ties.
        scores = [
            (np.stack([vectors[text] for text in texts]) * mean).sum(1) for texts, mean in zip(sets, means, strict=True)
        ]
        return np.array([function(torch.from_numpy(one)) for one in scores])

    return values


@lru_cache(maxsize=4)  # three numbers of matches ask for the same sets, and so do all looks at the reference
def _candidates(captions: Captions, pool: Captions) -> list[list[str]]:
    try:
        return [rp100(caption, pool, seed=SEED, num=OTHERS) for caption in captions]
    except UserError as error:
        raise Unmeasurable(
            f"needs {OTHERS} prompts of other templates for each clip, and the reference has fewer"
        ) from error


def key_of(clip: Clip) -> str:
    """What a clip's candidates are drawn by: no file's name, so that they are the same wherever it lies."""
    return digest([clip.prompt, clip.seed])


def _caption(prompt: str, template: str, name: str) -> Caption:
    return Caption(name, prompt, template or template_of(prompt))


@lru_cache(maxsize=1 << 14)
def template_of(prompt: str) -> str:
    """The template of Something-Something that a prompt fills, the one with most words of its own; else the prompt."""
    words = " ".join(prompt.lower().split()).rstrip(" .")
    fitting = [template for template in SSV2_TEMPLATES if pattern(template).fullmatch(words)]
    return max(fitting, key=lambda template: len(SLOT.sub("", template)), default=prompt)


@cache
def pattern(template: str) -> re.Pattern[str]:
    """What fits all prompts that fill a template, in lower case, with a group for each slot."""
    return re.compile("(.+)".join(re.escape(part) for part in SLOT.split(template.lower())))
