"""Which clips of a data set a run uses: so many, at most so many of a template, some templates only.

A choice depends on the ids and the seed, not on the order of the annotations or on the machine.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from vdm.data.captions import without_brackets
from vdm.data.ssv2 import ClipFile
from vdm.errors import UserError, nearest


def choose(
    clips: Sequence[ClipFile],
    *,
    num_clips: int | None = None,
    order: Literal["first", "random"] = "random",
    seed: int = 0,
    max_per_template: int | None = None,
    templates: Sequence[str] = (),
) -> list[ClipFile]:
    """The chosen clips, in the order of `clips`; null numbers choose all.

    `order` is that in which the numbers are filled: as listed, or at random. `templates` may be written with or without
    brackets. Raises UserError for a template that no clip has, or where no clip is left.
    """
    ranked = sorted(clips, key=lambda clip: _hash(seed, clip.id)) if order == "random" else list(clips)
    wanted = {without_brackets(template) for template in templates}
    there = {without_brackets(clip.template) for clip in clips}
    for template in sorted(wanted - there):
        guess = nearest(template, there)
        raise UserError(
            f"no clip has the template {template!r}"
            + (f"; did you mean {guess!r}?" if guess else "; see data.templates")
        )
    chosen: set[str] = set()
    per_template: Counter[str] = Counter()
    for clip in ranked:
        template = without_brackets(clip.template)
        if num_clips is not None and len(chosen) == num_clips:
            break
        if (wanted and template not in wanted) or clip.id in chosen:
            continue
        if max_per_template is not None and per_template[template] == max_per_template:
            continue
        per_template[template] += 1
        chosen.add(clip.id)
    return [clip for clip in clips if clip.id in chosen]


def _hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).hexdigest()
