"""Every clip is decoded once and shown to all extractors; a row of numbers is what stays of it.

Clips are shared out among the processes, and their rows gathered by key, so every process ends with the same rows in
the same order, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor
from tqdm import tqdm

from vdm import dist
from vdm.data.transforms import Frames
from vdm.evaluation.altered import NOISE, SEED, Alteration, as_it_is
from vdm.evaluation.cache import Row, load_rows, machinery, save_rows, source_sha256
from vdm.evaluation.clips import BadClip, Clip, Shape
from vdm.evaluation.records import digest

BATCH = 4  # clips decoded and held at a time
SAVE_EVERY = 64  # batches, after which what was extracted is written down

Rows = npt.NDArray[np.floating]
Texts = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Opened:
    """An extractor that is ready: `rows` of uint8 (B,T,H,W,3) and their B prompts are (B,D) floats, each of its own
    clip alone. `protocol` is what these depend on besides the clips. `texts`, of those that read any, are unit vectors
    (n,D) of n texts, to be held against the rows."""

    rows: Callable[[Frames, Sequence[str]], Rows]
    protocol: Mapping[str, object] = field(default_factory=dict)
    sha256: str | None = None  # of its weights
    warning: str = ""  # about them, for every record that they are in
    texts: Texts | None = None


@dataclass(frozen=True)
class Side:
    """Clips in the order of their ids, and a row (N,D) for each; `texts` as the extractor has them."""

    clips: tuple[Clip, ...]
    rows: Rows
    texts: Texts | None = None

    def part(self, places: Sequence[int]) -> Side:
        return replace(self, clips=tuple(self.clips[i] for i in places), rows=self.rows[list(places)])


@dataclass(frozen=True)
class Task:
    """Some clips, how one is read, and the looks at it that are wanted."""

    title: str
    clips: Sequence[Clip]
    read: Callable[[Clip, Shape], Frames]
    looks: Mapping[str, Alteration] = field(default_factory=lambda: {"": as_it_is})


@dataclass(frozen=True)
class Extracted:
    """The rows of all good clips by look and extractor, and each clip that is not, with a sentence that names it."""

    clips: tuple[Clip, ...]
    problems: tuple[tuple[Clip, str], ...]
    rows: Mapping[tuple[str, str], Rows]

    def side(self, extractor: str, look: str = "") -> Side:
        return Side(self.clips, self.rows[look, extractor])


def extract(task: Task, shape: Shape, extractors: Mapping[str, Opened], *, cache: Path) -> Extracted:
    """Rows of every clip of a task. All processes must call it with the same arguments, and get the same."""
    folders = {
        name: cache / f"{name}-{digest([one.protocol, one.sha256, source_sha256(), machinery()])[:16]}"
        for name, one in extractors.items()
    }
    known = {name: load_rows(folder) for name, folder in folders.items()}
    mine = task.clips[dist.rank() :: dist.size()]
    problems: dict[str, str] = {}
    with tqdm(total=len(mine), desc=task.title, unit="clip", disable=not dist.is_main()) as shown:
        for number, first in enumerate(range(0, len(mine), BATCH), start=1):
            batch = mine[first : first + BATCH]
            todo = [clip for clip in batch if _missing(clip, task, shape, known)]
            good, frames = _decoded(todo, task, shape, problems)
            if good:
                _extract_batch(good, frames, task, shape, extractors, known)
            if number % SAVE_EVERY == 0 or batch[-1] is mine[-1]:
                for name, folder in folders.items():
                    save_rows(folder, known[name], name=f"rank-{dist.rank()}")
            shown.update(len(batch))
    return _gathered(task, shape, known, mine, problems)


def _keys(clip: Clip, task: Task, shape: Shape) -> dict[str, str]:
    """What the rows of a clip are kept under, by look."""
    read = task.read.__name__, shape.num_frames, float(shape.fps), shape.height, shape.width
    # An alteration is drawn for the clip's id; without one that does not matter.
    drawn = {look: [look, clip.id, NOISE, SEED] if look else [] for look in task.looks}
    return {look: digest([clip.sha256, read, clip.prompt, drawn[look]]) for look in task.looks}


def _missing(clip: Clip, task: Task, shape: Shape, known: Mapping[str, Mapping[str, Row]]) -> bool:
    return any(key not in rows for key in _keys(clip, task, shape).values() for rows in known.values())


def _decoded(
    clips: Sequence[Clip], task: Task, shape: Shape, problems: dict[str, str]
) -> tuple[list[Clip], list[Frames]]:
    """Those clips that can be read, and their frames."""
    good, frames = [], []
    for clip in clips:
        try:
            frames.append(task.read(clip, shape))
        except BadClip as error:
            problems[clip.id] = str(error)
        else:
            good.append(clip)
    return good, frames


def _extract_batch(
    clips: Sequence[Clip],
    frames: Sequence[Frames],
    task: Task,
    shape: Shape,
    extractors: Mapping[str, Opened],
    known: Mapping[str, dict[str, Row]],
) -> None:
    keys = [_keys(clip, task, shape) for clip in clips]
    prompts = [clip.prompt for clip in clips]
    for look, alter in task.looks.items():
        wanted = [name for name in extractors if any(key[look] not in known[name] for key in keys)]
        if not wanted:
            continue
        batch = np.stack([alter(one, clip.id) for one, clip in zip(frames, clips, strict=True)])
        for name in wanted:
            rows = extractors[name].rows(batch, prompts)
            assert rows.ndim == 2 and len(rows) == len(clips), f"{name}: a row for each clip"
            known[name] |= {key[look]: row for key, row in zip(keys, rows, strict=True)}


def _gathered(
    task: Task, shape: Shape, known: Mapping[str, Mapping[str, Row]], mine: Sequence[Clip], problems: Mapping[str, str]
) -> Extracted:
    """Of every process's clips, in the order of their ids."""
    ours = {
        clip.id: [[known[name][key] for name in known] for key in _keys(clip, task, shape).values()]
        for clip in mine
        if clip.id not in problems
    }
    theirs = {name: rows for part in dist.gathered(ours) for name, rows in part.items()}
    bad = {name: text for part in dist.gathered(dict(problems)) for name, text in part.items()}
    clips = tuple(sorted((clip for clip in task.clips if clip.id in theirs), key=lambda clip: clip.id))
    rows = {
        (look, name): np.stack([theirs[clip.id][i][j] for clip in clips]) if clips else np.empty((0, 0))
        for i, look in enumerate(task.looks)
        for j, name in enumerate(known)
    }
    problems_found = tuple((clip, bad[clip.id]) for clip in task.clips if clip.id in bad)
    return Extracted(clips, problems_found, rows)


def halves(side: Side, *, most: int) -> tuple[Side, Side]:
    """Two parts of a side of one size, half of it but at most so many clips: by the hash of the ids, so whatever their
    order says falls to both alike."""
    order = sorted(range(len(side.clips)), key=lambda i: digest(side.clips[i].id))
    size = min(most, len(order) // 2)
    return side.part(sorted(order[:size])), side.part(sorted(order[size : 2 * size]))
