"""Sample folders, sides and records by hand, for the tests of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vdm.data.video import write_video
from vdm.evaluation.clips import (
    Clip,
    Shape,
)
from vdm.evaluation.extract import Side
from vdm.evaluation.records import (
    Record,
    make_record,
)

SHAPE = Shape(num_frames=4, fps=8.0, height=32, width=48)


def frames(seed: int, *, num_frames: int = 4, height: int = 32, width: int = 48) -> np.ndarray:
    """A clip that no other seed has, smooth enough for a codec."""
    phase = np.arange(num_frames)[:, None, None, None] / 5 + seed
    y, x, c = np.ogrid[:height, :width, :3]
    return (127 + 120 * np.sin(phase + x / 9 + y / 7 + c)).astype(np.uint8)


def samples(folder: Path, count: int = 3, **changed: object) -> list[dict[str, object]]:
    """A sample folder, and its lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        write_video(folder / f"{i:05d}.mp4", frames(i), fps=8.0)
        line = {"file": f"{i:05d}.mp4", "prompt": f"prompt {i}", "seed": i, "num_frames": 4, "height": 32, "width": 48}
        lines.append({**line, "fps": 8.0, **changed})
    write_lines(folder, lines)
    return lines


def write_lines(folder: Path, lines: Sequence[object]) -> None:
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def side(rows: Sequence[Sequence[float]], prompts: Sequence[str] | None = None) -> Side:
    names = [f"{i:04d}" for i in range(len(rows))]
    texts = names if prompts is None else prompts
    # No two clips of the tests have the same bytes, though ids begin anew on each side.
    clips = tuple(
        Clip(name, Path(name), text, f"{name} {row}") for name, text, row in zip(names, texts, rows, strict=True)
    )
    return Side(clips, np.array(rows, dtype=np.float64))


def a_record(value: float | None = 1.5, name: str = "fvd", **protocol: object) -> Record:
    record = Record(name, value, (1.0, 2.0), 8, 9, 0.1, {"frozen": 3.0}, True, warnings=("w",), weights_sha256="ab")
    return make_record(record, {"T": 16, "fps": 8.0, **protocol})
