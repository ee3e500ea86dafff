"""R-precision: does a clip match its own prompt better than other prompts?

After Xu et al. 2018 (AttnGAN, arXiv:1711.10485): the true prompt is ranked among it and 99 that do not match. Four ways
to choose what does not match: any prompt (`rp100`), another action with the same objects (`rp_action`), the same action
with other objects (`rp_object`), and one look-alike (`rp_pair`). A candidate set is a list of prompts, the true one
first, and depends on the seed and on the clip's id alone: not on the order of the clips, nor on batch or rank.

A mean over frames does not see their order. With CLIP, left and right or picking up and putting down are told apart at
chance: `rp_pair` is for networks that watch videos.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vdm.errors import UserError
from vdm.metrics.template_pairs import PAIRS
from vdm.templates import SSV2_TEMPLATES

_SLOT = re.compile(r"\[[^\[\]]*\]")


@dataclass(frozen=True)
class Caption:
    """A clip's id and prompt; `template` is Something-Something's label with its slots, `objects` fill them."""

    id: str
    text: str
    template: str
    objects: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.objects and len(self.objects) != num_slots(self.template):
            raise ValueError(f"{self.template!r} has {num_slots(self.template)} slots, not {len(self.objects)}")


def num_slots(template: str) -> int:
    """How many objects a template has room for."""
    return len(_SLOT.findall(template))


def fill_template(template: str, objects: Sequence[str]) -> str:
    """A template with its slots filled in order, in lower case, as Something-Something's captions are made."""
    fillers = iter(objects)
    return _SLOT.sub(lambda _: next(fillers), template).lower()


@lru_cache(maxsize=1 << 16)  # each clip looks at every prompt of the pool
def normalised(text: str) -> str:
    """What two prompts must differ in: lower case, no brackets, single spaces, no full stop."""
    return " ".join(re.sub(r"[\[\]]", "", text).lower().split()).rstrip(" .")


# Candidate sets


def rp100(caption: Caption, pool: Sequence[Caption], *, seed: int, num: int = 99) -> list[str]:
    """The caption's own prompt, then `num` of other templates, drawn without replacement. Chance is 1 %.

    No candidate is of the caption's own template (such a prompt may be true of the clip as well), and no two are the
    same text. Raises UserError where the pool has too few.
    """
    own = normalised(caption.template)
    also_true = [c.text for c in pool if normalised(c.template) == own]
    others = _distinct((c.text for c in pool if normalised(c.template) != own), but=[caption.text, *also_true])
    if len(others) < num:
        raise UserError(
            f"R-precision of {caption.id} needs {num} prompts of other templates, and there are {len(others)}; "
            "evaluate more clips, or leave rp100 out"
        )
    return [caption.text, *_draw(others, num, seed=seed, key=caption.id)]


def rp_action(caption: Caption, *, templates: Iterable[str] = SSV2_TEMPLATES) -> list[str]:
    """The caption's template, then all others with as many slots, each filled with the caption's objects."""
    own = fill_template(caption.template, caption.objects)
    fitting = (t for t in templates if num_slots(t) == len(caption.objects))
    return [own, *_distinct((fill_template(t, caption.objects) for t in fitting), but=[own])]


def rp_object(caption: Caption, pool: Iterable[Caption], *, seed: int, num: int = 99) -> list[str]:
    """The caption's template with its objects, then with those of up to `num` other captions, drawn from the pool."""
    own = fill_template(caption.template, caption.objects)
    fitting = (c.objects for c in pool if len(c.objects) == len(caption.objects))
    others = _distinct((fill_template(caption.template, objects) for objects in fitting), but=[own])
    return [own, *_draw(others, num, seed=seed, key=caption.id)]


def rp_pair(caption: Caption, *, pairs: Iterable[tuple[str, str]] = PAIRS) -> list[list[str]]:
    """One set of two for each template that the caption's may be taken for, in a mirror or backwards, say. Chance 50 %.

    None where there is no such template.
    """
    own = normalised(caption.template)
    named = [(normalised(one), normalised(other), one, other) for one, other in pairs]
    partners = [other if own == a else one for a, b, one, other in named if own in (a, b)]
    return [[fill_template(t, caption.objects) for t in (caption.template, partner)] for partner in sorted(partners)]


def _distinct(texts: Iterable[str], *, but: Iterable[str]) -> list[str]:
    """One spelling of each text, in no order that matters, without those of `but`."""
    found: dict[str, str] = {}
    for text in texts:
        key = normalised(text)
        found[key] = min(found.get(key, text), text)
    for text in but:
        found.pop(normalised(text), None)
    return list(found.values())


def _draw(texts: list[str], num: int, *, seed: int, key: str) -> list[str]:
    """`num` texts, or all: those whose hash with seed and key is smallest, which no order or platform changes."""
    salt = hashlib.sha256(f"{seed}:{key}".encode()).digest()

    def place(text: str) -> tuple[bytes, str]:
        return hashlib.blake2b(normalised(text).encode(), key=salt, digest_size=16).digest(), text

    return heapq.nsmallest(num, texts, key=place)


# Ranks


def similarities(
    frames: Tensor, candidates: Sequence[Sequence[str]], *, texts: Callable[[Sequence[str]], Tensor]
) -> list[Tensor]:
    """For each clip, its mean cosine with each of its candidates: a list of B tensors (K,) float64.

    frames (B, T, D) unit vectors; `texts` gives unit vectors (n, D), as `Clip.texts` does. Each distinct text is read
    once, so that two equal candidates have equal scores.
    """
    if frames.dim() != 3 or len(frames) != len(candidates):
        raise ValueError(f"frames {tuple(frames.shape)} and {len(candidates)} candidate sets do not fit")
    distinct = sorted({text for row in candidates for text in row})
    place = {text: index for index, text in enumerate(distinct)}
    features = texts(distinct).double()  # (U, D)
    means = frames.double().mean(1)  # (B, D); the mean of the cosines is the product with the mean frame
    # Not a matrix product, which may round equal rows differently: ties must stay ties.
    return [
        (features[[place[text] for text in row]] * mean).sum(-1) for row, mean in zip(candidates, means, strict=True)
    ]


def expected_credit(scores: Tensor, *, at: int) -> float:
    """The chance that the truth, scores[0], is among the best `at` of scores (K,) when ties are broken by lot.

    clip((at - greater) / equal, 0, 1), where `equal` counts the truth too.
    """
    greater, equal = _above_and_level(scores)
    return min(max((at - greater) / equal, 0.0), 1.0)


def expected_rank(scores: Tensor) -> float:
    """The truth's mean place among scores (K,), from 1, when ties are broken by lot."""
    greater, equal = _above_and_level(scores)
    return greater + (equal + 1) / 2


def _above_and_level(scores: Tensor) -> tuple[int, int]:
    if scores.dim() != 1 or not len(scores) or not scores.isfinite().all():
        raise ValueError(f"scores must be finite numbers (K,) with the truth first, got {tuple(scores.shape)}")
    return int((scores > scores[0]).sum()), int((scores == scores[0]).sum())


@dataclass(frozen=True)
class Retrieval:
    """R-precision of `num_clips` clips; `recall` and `chance` are by R = 1, 5, 10, as shares of 1."""

    num_clips: int
    recall: dict[int, float]
    chance: dict[int, float]
    median_rank: float


def retrieval(rows: Sequence[Tensor], *, at: tuple[int, ...] = (1, 5, 10)) -> Retrieval:
    """Scores of each clip's candidates, the truth first (sets may differ in size) -> means over the clips.

    `chance` is what scores without meaning would get. Raises ValueError for no clips, or a score that is NaN.
    """
    if not rows:
        raise ValueError("R-precision of no clips")
    ranks = torch.tensor([expected_rank(row) for row in rows], dtype=torch.float64)
    return Retrieval(
        num_clips=len(rows),
        recall={r: sum(expected_credit(row, at=r) for row in rows) / len(rows) for r in at},
        chance={r: sum(min(r / len(row), 1.0) for row in rows) / len(rows) for r in at},
        median_rank=ranks.quantile(0.5).item(),
    )
