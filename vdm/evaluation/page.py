"""The page of an evaluation: every record with its bar, actions, and clips beside the reference nearest to them."""

from __future__ import annotations

import html
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vdm import webpage
from vdm.data.transforms import Frames
from vdm.data.video import write_video
from vdm.evaluation import bars
from vdm.evaluation.catalogue import Metric
from vdm.evaluation.clips import MOST_REFERENCE, Clip, Shape, read_generated, read_reference
from vdm.evaluation.per_clip import Line
from vdm.evaluation.records import Record, interval, notes_of, number
from vdm.metrics.intervals import wilson

FILE = "report.html"
MOST_SHOWN = 4  # best clips, and as many worst
ALIKE = 0.1  # of reference clips, those most alike, by which copies are not judged
STYLE = """
body { max-width: 1500px } h2 { margin-top: 1.6em } .bad { color: #a4262c } small { color: #666 }
h1 { font-size: 1.5em; margin: 0 } h1 + p { margin: .2em 0; color: #666 }
table.plain { border-collapse: collapse; font-size: 14px; line-height: 1.3 }
table.plain td, table.plain th { padding: 4px 1.4em 4px 0; text-align: left; white-space: nowrap }
table.plain td:first-child { white-space: normal; max-width: 24em }
table.plain th { font-weight: 400; color: #666 } table.plain tr { border-bottom: 1px solid #eee }
table.notes td { white-space: normal; vertical-align: top; font-size: 13px }
table.notes td:first-child { width: 36% }
main { grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1em }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 4px } details { margin: .3em 0 }
pre { background: #f6f6f6; padding: .6em; overflow-x: auto; font-size: 12px }
.confusion td { width: 2.1em; height: 2.1em; text-align: center; font-size: 12px; border: 1px solid #eee }
.confusion th { font-weight: 400; font-size: 12px; text-align: left; padding-right: .8em; white-space: nowrap }
"""
SCRIPT = """
for (const video of document.querySelectorAll("video"))
  video.addEventListener("click", () => video.paused ? video.play() : video.pause());
"""


@dataclass(frozen=True)
class Confusion:
    """How often clips whose prompt is of the row's class were judged to be of the column's: counts (R,C)."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    counts: np.ndarray


@dataclass(frozen=True)
class Content:
    """What the page tells."""

    records: Sequence[Record]
    metrics: Sequence[Metric]
    lines: Sequence[Line]
    generated: Sequence[Clip]
    reference: Sequence[Clip]
    shape: Shape
    confusions: Sequence[Confusion] = ()


def write_page(folder: Path, content: Content) -> Path:
    """Write `report.html`, which needs no other file, and appears whole or not at all; returns its path."""
    title = f"{len(content.generated)} generated clips against {len(content.reference)}"
    parts = [
        f"<h1>{title}</h1>\n<p>Read at {html.escape(str(content.shape))}.</p>\n",
        _records(content),
        *map(_actions, content.confusions),
        _memorised(content),
        _clips(content),
        _protocols(content.records),
    ]
    styles = f"{bars.STYLE}{STYLE}"
    remedy = "choose another --output_dir"
    return webpage.write_page(folder / FILE, title, "".join(parts), style=styles, script=SCRIPT, remedy=remedy)


# ---- records


def _records(content: Content) -> str:
    rows = "".join(
        _row(record, metric) for record, metric in zip(content.records, content.metrics, strict=True) if record.ok
    )
    heads = ("metric", "value", "95 %", "reference", "floor", "", "better", "clips")
    head = "".join(f"<th>{name}</th>" for name in heads)
    notes = "".join(
        f"<tr><td>{html.escape(names)}</td><td>{html.escape(sentence)}</td></tr>\n"
        for names, sentence in notes_of(content.records)
    )
    told = f'<h2>Notes</h2>\n<table class="plain notes">\n{notes}</table>\n' if notes else ""
    return f'{bars.legend()}<table class="plain">\n<tr>{head}</tr>\n{rows}</table>\n{told}'


def _row(record: Record, metric: Metric) -> str:
    invalid = "" if record.valid else '<br><b class="bad">not valid</b>'
    cells = (
        f"<b>{html.escape(record.metric)}</b><br><small>{html.escape(metric.about)}</small>",
        f"<b>{number(record.value)}</b>{invalid}",
        interval(record.ci95),
        number(record.ceilings.get("reference")),
        number(record.floor),
        bars.bar(record),
        metric.better,
        f"{record.n_generated} / {record.n_reference}",
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"


def _protocols(records: Sequence[Record]) -> str:
    parts = [
        f"<details><summary>{html.escape(record.metric)} {record.protocol_hash[:12]}</summary>"
        f"<pre>{html.escape(json.dumps(dict(record.protocol), indent=1))}</pre></details>\n"
        for record in records
    ]
    return f"<h2>Protocols</h2>\n{''.join(parts)}"


# ---- actions


def _actions(confusion: Confusion) -> str:
    """Accuracy by action, and what was taken for what."""
    totals = confusion.counts.sum(1)
    head = "".join(f'<th title="{html.escape(name)}">{i + 1}</th>' for i, name in enumerate(confusion.columns))
    rows = []
    for i, name in enumerate(confusion.rows):
        if not totals[i]:
            continue
        right = confusion.columns.index(name) if name in confusion.columns else -1
        hits = int(confusion.counts[i, right]) if right >= 0 else 0
        cells = "".join(
            f'<td style="background:rgba(31,111,180,{count / totals[i]:.2f});'
            f'color:{"#fff" if 2 * count > totals[i] else "#222"}">{int(count) or ""}</td>'
            for count in confusion.counts[i]
        )
        share = interval(wilson(hits, int(totals[i])))
        told = f"<th>{right + 1} {html.escape(name)}</th><th>{hits} of {int(totals[i])} ({share})</th>"
        rows.append(f"<tr>{told}{cells}</tr>\n")
    names = "".join(f"<li>{html.escape(name)}</li>\n" for name in confusion.columns)
    return (
        f"<h2>{html.escape(confusion.title)}</h2>\n<p>Rows are what the prompts say, columns what was seen.</p>\n"
        f'<table class="confusion">\n'
        f"<tr><th></th><th></th>{head}</tr>\n{''.join(rows)}</table>\n"
        f"<details><summary>columns</summary><ol>\n{names}</ol></details>\n"
    )


# ---- clips


def _memorised(content: Content) -> str:
    """Whether generated clips are copies: far nearer to a reference clip than reference clips are to each other."""
    ours, theirs = (
        {line.id: line.distance for line in content.lines if line.side == side and line.distance is not None}
        for side in ("generated", "reference")
    )
    # Not the least distance, for a few reference clips that are alike must not hide copies.
    bound = float(np.quantile(list(theirs.values()), ALIKE)) / 2.0
    real = {clip.sha256 for clip in content.reference}
    same = {clip.id for clip in content.generated if clip.sha256 in real}
    copies = sum(distance < bound or not distance or name in same for name, distance in ours.items())
    near, apart = list(ours.values()), list(theirs.values())
    return (
        "<h2>Is it memory?</h2>\n"
        f"<p>{copies} of {len(ours)} generated clips are nearer to a reference clip than {bound:.1f} grey levels, half "
        "of what nine in ten reference clips are away from all others, or are the same file. The nearest is "
        f"{min(near):.1f} away, the median {np.median(near):.1f}; between reference clips these are {min(apart):.1f} "
        f"and {np.median(apart):.1f} (root mean square of small pictures). Only these {len(theirs)} were looked at "
        f"(at most {MOST_REFERENCE}, drawn by lot): a copy of another clip is not seen.</p>\n"
    )


def ranked(metrics: Sequence[Metric], lines: Sequence[Line]) -> tuple[list[str], list[Line]]:
    """Generated clips, best first: by the mean of their ranks in all metrics of which more, or less, is better; and
    the names of those. In the order of their ids where there are none."""
    ours = [line for line in lines if line.side == "generated" and not line.problem]
    signs = {
        metric.name: 1.0 if metric.better == "lower" else -1.0
        for metric in metrics
        if metric.better != "as the reference"
    }
    names = [name for name, sign in signs.items() if sign and any(name in line.values for line in ours)]
    scores = np.zeros(len(ours))
    for name in names:
        values = np.array([signs[name] * line.values.get(name, np.nan) for line in ours])
        middle = np.nanmedian(values)
        values = np.where(np.isnan(values), middle, values)
        # Ranks from 0 to 1, the same for clips that are alike.
        scores += (values[:, None] > values[None]).mean(1) + 0.5 * (values[:, None] == values[None]).mean(1)
    order = sorted(range(len(ours)), key=lambda i: (scores[i], ours[i].id))
    return names, [ours[i] for i in order]


def _clips(content: Content) -> str:
    names, order = ranked(content.metrics, content.lines)
    best = order[:MOST_SHOWN]
    worst = [line for line in order[-MOST_SHOWN:] if line not in best]
    by = f"by the mean of their ranks in {', '.join(names)}" if names else "in the order of their names"
    generated = {clip.id: clip for clip in content.generated}
    reference = {clip.id: clip for clip in content.reference}
    told = "Left: generated; right: the reference clip nearest to it. A click stops or starts one."
    parts = [f"<h2>Clips</h2>\n<p>{told} Best and worst {by}.</p>\n"]
    with tempfile.TemporaryDirectory() as folder:
        for title, lines in (("Best", best), ("Worst", worst)):
            if lines:
                figures = "".join(_pairs(lines, generated, reference, content.shape, Path(folder) / "clip.mp4"))
                parts.append(f"<h3>{title}</h3>\n<main>\n{figures}</main>\n")
    return "".join(parts)


def _pairs(
    lines: Sequence[Line],
    generated: Mapping[str, Clip],
    reference: Mapping[str, Clip],
    shape: Shape,
    file: Path,
) -> Iterator[str]:
    for line in lines:
        ours, theirs = generated[line.id], reference[line.nearest]
        videos = "".join(
            _video(frames, shape.fps, file) for frames in (read_generated(ours, shape), read_reference(theirs, shape))
        )
        values = ", ".join(f"{name} {number(value)}" for name, value in line.values.items())
        away = "" if line.distance is None else f", {line.distance:.1f} grey levels away"
        yield (
            f'<figure>\n<div class="pair">{videos}</div>\n<figcaption><b>{html.escape(line.prompt)}</b>'
            f"<small>{html.escape(line.id)}; nearest {html.escape(theirs.id)} ({html.escape(theirs.prompt)})"
            f"{away}</small><details><summary><small>values</small></summary><small>{html.escape(values)}</small></details>"
            "</figcaption>\n</figure>\n"
        )


def _video(frames: Frames, fps: float, file: Path) -> str:
    """Encoded anew, so that a browser plays whatever the file was."""
    write_video(file, frames, fps=fps)
    return webpage.video(file.read_bytes(), "autoplay loop")
