"""What each clip got by itself, kept so that two runs can be compared clip by clip; and the reference nearest to it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from vdm.errors import UserError
from vdm.evaluation.checked import WRONG, built
from vdm.evaluation.extract import Extracted, Rows
from vdm.evaluation.extractors import THUMBNAIL
from vdm.evaluation.measures import Values
from vdm.files import replacing

FILE = "per_clip.jsonl"


@dataclass(frozen=True)
class Line:
    """One clip. `nearest` is the id of the reference clip that looks most like it (another one, of a reference clip),
    `distance` how far that is: root of the mean square difference of small pictures, in grey levels. `problem` says why
    it was left out; then it has neither."""

    side: str  # generated | reference
    id: str
    prompt: str
    seed: int | None
    nearest: str = ""
    distance: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""


def lines_of(side: str, values: Mapping[str, Values | None], clips: Extracted, reference: Extracted) -> Iterator[Line]:
    """A line for each clip of a side; a metric that does not count it has no value there."""
    places, distances = nearest(clips.rows["", THUMBNAIL], reference.rows["", THUMBNAIL], itself=clips is reference)
    for i, clip in enumerate(clips.clips):
        mine = {name: float(v[i]) for name, v in values.items() if v is not None and math.isfinite(v[i])}
        near = reference.clips[places[i]].id
        yield Line(side, clip.id, clip.prompt, clip.seed, near, round(float(distances[i]), 4), mine)
    for clip, problem in clips.problems:
        yield Line(side, clip.id, clip.prompt, clip.seed, problem=problem)


def nearest(rows: Rows, reference: Rows, *, itself: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """For each of rows (N,D) the place (N,) of the nearest of reference (M,D), and the distance (N,), root mean square.

    `itself`: both are the same set, and no clip is its own nearest.
    """
    x, y = rows.astype(np.float64), reference.astype(np.float64)
    squares = (y**2).sum(1)
    places = np.empty(len(x), dtype=np.int64)
    for i, row in enumerate(x):
        apart = squares - 2.0 * (y @ row)  # less what is the same for all
        if itself:
            apart[i] = np.inf
        places[i] = int(np.argmin(apart))
    return places, np.sqrt(((x - y[places]) ** 2).mean(1))


def write_per_clip(folder: Path, lines: Sequence[Line]) -> str:
    """Write `per_clip.jsonl`, one object a line; returns its sha256 in hex."""
    content = "".join(json.dumps(asdict(line), allow_nan=False) + "\n" for line in lines).encode("ascii")
    with replacing(folder / FILE, remedy="choose another --output_dir") as file:
        file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def read_per_clip(folder: Path) -> tuple[list[Line], str]:
    """The lines, and the sha256 of the file. Raises UserError where the folder has none that can be read."""
    path = folder / FILE
    try:
        content = path.read_bytes()
        lines = [built(Line, json.loads(line)) for line in content.decode("utf-8").split("\n") if line]
    except (OSError, *WRONG) as error:
        raise UserError(f"{path} cannot be read ({error}); give the --output_dir of a vdm evaluate") from error
    return lines, hashlib.sha256(content).hexdigest()
