"""`vdm data check`: every clip of a data set decoded once, in full, and what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vdm.data.captions import caption
from vdm.data.clips import duration
from vdm.data.find import find_clips, guess_format
from vdm.data.pool import Lost, run_each
from vdm.data.ssv2 import ClipFile, NoFiles, NoSuchSplit, Split
from vdm.data.video import UnreadableClip, scan
from vdm.errors import UserError
from vdm.files import is_file, replacing

SHORT = "short: "  # how the problem of a clip begins that is merely short
FROZEN_SHARE = 0.8  # a clip more of whose frames show what the one before does is no moving picture
SHORTEST = 16 / 8  # seconds of 16 frames at 8 fps


@dataclass(frozen=True)
class Checked:
    """One clip; `frames` as decoded, size after rotation, `problem` None when it is good."""

    id: str
    file: str
    frames: int = 0
    width: int = 0
    height: int = 0
    fps: float = 0.0
    duration: float = 0.0
    rotation: int = 0
    problem: str | None = None

    @property
    def bad(self) -> bool:
        """Whether it cannot be used as it is; a short clip can."""
        return self.problem is not None and not self.problem.startswith(SHORT)


def find_all(root: Path | str) -> list[ClipFile]:
    """Every clip that a data set of any format lists, each file once. Raises UserError where there is none."""
    config = guess_format(str(root))
    found: dict[tuple[str, str], ClipFile] = {}
    errors: list[UserError] = []
    splits: tuple[Split, ...] = ("train", "validation", "test")
    for split in splits:
        try:
            for clip in find_clips(config, split):
                found.setdefault((clip.id, str(clip.path)), clip)
        except NoSuchSplit as error:  # not every data set has all splits
            errors.append(error)
        except NoFiles as error:
            print(f"note: {error}", file=sys.stderr)
            errors.append(error)
    if not found:
        raise errors[0]
    return list(found.values())


def check_clip(clip: ClipFile) -> Checked:
    """Decode one clip in full."""
    blank = Checked(clip.id, str(clip.path))
    if clip.problem:
        return replace(blank, problem=clip.problem)
    try:
        found = scan(clip.path)
    except UnreadableClip as error:
        return replace(blank, problem=error.reason)
    except Exception as error:  # one file, whatever it is, must not end the check of all others
        return replace(blank, problem=f"it cannot be checked: {type(error).__name__}: {error}")
    count, seconds = len(found.times), duration(found.times)
    elapsed = float(found.times[-1] - found.times[0])
    fps = (count - 1) / elapsed if elapsed > 0 else 0.0
    checked = replace(
        blank, frames=count, width=found.width, height=found.height, fps=round(fps, 3), duration=round(seconds, 3),
        rotation=found.rotation,
    )  # fmt: skip
    if found.error or count < found.num_listed:
        why = f" ({found.error})" if found.error else ""
        return replace(checked, problem=f"truncated: {count} of {found.num_listed} frames decode{why}")
    if count > 2 and found.num_same >= FROZEN_SHARE * (count - 1):
        return replace(checked, problem=f"frozen: {found.num_same} of {count} frames show what the one before does")
    if clip.template and caption(clip.template, clip.placeholders) != clip.caption.lower():
        return replace(checked, problem=f"its label {clip.caption!r} is not its template with the slots filled")
    if seconds < SHORTEST:
        return replace(checked, problem=f"{SHORT}{seconds:.2f} seconds")
    return checked


def check(root: Path | str, *, num_workers: int | None = None, time_limit: float = 120.0) -> list[Checked]:
    """Every clip of a data set, in its order, with a progress bar on stderr. Raises UserError."""
    clips = find_all(root)
    results: dict[int, Checked] = {}
    jobs = run_each(check_clip, clips, num_workers=num_workers or os.cpu_count() or 1, time_limit=time_limit)
    for index, found in tqdm(jobs, total=len(clips), desc="checking", unit="clip"):
        lost = isinstance(found, Lost)
        results[index] = Checked(clips[index].id, str(clips[index].path), problem=str(found)) if lost else found
    return [results[index] for index in range(len(clips))]


def write_report(path: Path, checked: Sequence[Checked]) -> None:
    """The records as a JSON list. Raises UserError where the file cannot be written."""
    with replacing(path, remedy="choose another --json file") as file:
        file.write_text(json.dumps([asdict(one) for one in checked], indent=1) + "\n", encoding="utf-8")


def claim(path: Path) -> None:
    """Make sure before the work that a report can be written, and leave the one that is there as it is.

    Raises UserError where it cannot.
    """
    if not is_file(path):
        write_report(path, [])
        return
    with replacing(path, remedy="choose another --json file") as file:
        shutil.copyfile(path, file)


def table(checked: Sequence[Checked]) -> str:
    """A summary in words: counts, lengths, sizes and rates, then every clip that is not good by name."""
    seen = [one for one in checked if one.frames]
    bad, short = [one for one in checked if one.bad], [one for one in checked if one.problem and not one.bad]
    lines = [f"{len(checked)} clips: {len(checked) - len(bad) - len(short)} good, {len(short)} short, {len(bad)} bad"]
    if seen:
        seconds = np.array([one.duration for one in seen])
        low, middle, high = np.percentile(seconds, [0, 50, 100])
        lines.append(f"seconds: {low:.2f} to {high:.2f}, median {middle:.2f}, {seconds.sum() / 3600:.3f} hours in all")
        lines.append("sizes: " + _most(f"{one.width}x{one.height}" for one in seen))
        lines.append("frames per second: " + _most(f"{one.fps:.4g}" for one in seen))
        if turned := sum(one.rotation != 0 for one in seen):
            lines.append(f"rotated by their metadata: {turned}")
    lines += [f"  {one.id}: {one.problem} ({one.file})" for one in (*bad, *short)]
    return "\n".join(lines)


def _most(values: Iterable[str]) -> str:
    counts = Counter(values).most_common()
    shown = ", ".join(f"{value} ({count})" for value, count in counts[:5])
    return f"{shown} and {len(counts) - 5} more" if len(counts) > 5 else shown
