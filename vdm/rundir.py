"""What a run folder says, be its run at work, finished, killed or resumed, and its files whole or not."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vdm.config import Config, load
from vdm.errors import UserError
from vdm.files import is_file
from vdm.training.environment import read_starts
from vdm.training.preview import CAPTIONS

LARGEST = 1e150
Record = dict[str, float]  # the numbers of a step by name, "step" among them; those that are not finite are left out


@dataclass(frozen=True)
class Preview:
    """The clips of a preview in their order, and what each was to show."""

    step: int
    clips: list[Path]
    captions: list[str]


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it; `config` is None where config.yaml is not one that this version reads."""

    folder: Path
    status: Literal["running", "finished", "stopped"]
    config: Config | None
    config_text: str
    records: list[Record]  # by step, each step once
    starts: list[dict[str, object]]
    previews: list[Preview]


def read_run(folder: Path) -> Run:
    """Read all that a page about a run shows. Raises UserError where the folder is not one of a run."""
    if not is_file(folder / "log.jsonl"):
        reason = "holds no log.jsonl" if folder.is_dir() else "is not a folder"
        raise UserError(f"{folder} is not of a run, for it {reason}; name the folder of one, such as runs/smoke")
    try:
        config = load(folder / "config.yaml")
    except UserError:
        config = None
    if _in_use(folder):
        status: Literal["running", "finished", "stopped"] = "running"
    else:
        status = "finished" if is_file(folder / "final" / "manifest.json") else "stopped"
    return Run(
        folder=folder,
        status=status,
        config=config,
        config_text=_text(folder / "config.yaml"),
        records=_records(_text(folder / "log.jsonl")),
        starts=read_starts(folder),
        previews=sorted(_previews(folder / "samples"), key=lambda preview: preview.step),
    )


def _text(file: Path) -> str:
    """What can be read of a file, or nothing."""
    try:
        return file.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def _in_use(folder: Path) -> bool:
    """Whether a process holds the run's lock (`checkpoint.RunLock`), which is let go of with the process."""
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(handle)


def _records(text: str) -> list[Record]:
    """The lines that are whole; of two of one step the later counts."""
    by_step: dict[int, Record] = {}
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and _is_number(found.get("step")):
            by_step[found["step"]] = {name: value for name, value in found.items() if _is_number(value)}
    return [by_step[step] for step in sorted(by_step)]


def _is_number(value: object) -> bool:
    """Whether it can be drawn: the squares of larger numbers cannot be held."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _previews(samples: Path) -> Iterator[Preview]:
    for folder in samples.glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", folder.name)
        clips = sorted(folder.glob("*.mp4"))
        if match and clips:
            yield Preview(int(match[1]), clips, _captions(folder / CAPTIONS, count=len(clips)))


def _captions(file: Path, *, count: int) -> list[str]:
    try:
        found = json.loads(_text(file))
    except (ValueError, RecursionError):
        found = None
    known = [str(caption) for caption in found] if isinstance(found, list) else []
    return (known + [f"clip {number}" for number in range(len(known), count)])[:count]
