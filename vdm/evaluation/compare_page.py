"""The page of a comparison: every metric over the runs, such as checkpoints of one training, and what differs."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vdm import charts
from vdm.charts import Curve, chart
from vdm.evaluation.records import Record, interval
from vdm.webpage import write_page

FILE = "compare.html"
STYLE = """
body { max-width: 1500px } h2 { margin-top: 1.4em } small { color: #666 }
table.plain { border-collapse: collapse; font-size: 14px }
table.plain td, table.plain th { padding: 3px 1.2em 3px 0; text-align: left; vertical-align: top; font-weight: 400 }
table.plain tr:first-child th { color: #666 } table.plain td.sure { font-weight: 600 }
"""
STEP = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Run:
    """An output folder of `vdm evaluate`, and its records by metric."""

    name: str
    records: Mapping[str, Record]

    @property
    def checkpoint(self) -> str:
        """What made the clips; "" where that is not known."""
        return next((str(record.protocol.get("checkpoint") or "") for record in self.records.values()), "")


@dataclass(frozen=True)
class Row:
    """How one metric of one run differs from that of the first; `sure` where the interval leaves out 0."""

    metric: str
    run: str
    difference: float
    ci95: tuple[float, float] | None
    how: str
    note: str
    sure: bool


def places(runs: Sequence[Run]) -> tuple[str, list[int]]:
    """What runs lie along, and where: their training steps where each has one of its own, else the order given."""
    found = [STEP.search(run.checkpoint) for run in runs]
    steps = [int(one[1]) for one in found if one]
    if len(set(steps)) == len(runs):
        return "step", steps
    return "run", list(range(1, len(runs) + 1))


def write_compare_page(folder: Path, runs: Sequence[Run], metrics: Sequence[str], rows: Sequence[Row]) -> Path:
    """Write `compare.html`, which needs no other file, and appears whole or not at all; returns its path.

    Every run has a value of every metric.
    """
    along, at = places(runs)
    title = f"{len(runs)} runs compared"
    figures = "".join(_chart(name, runs, along, at) for name in metrics)
    body = (
        f"<h1>{title}</h1>\n{_runs(runs, along, at)}<h2>Metrics by {along}</h2>\n"
        "<p><small>Shaded: the 95 % interval of each value. Values of the same clips differ by less than two intervals "
        f'suggest; see below.</small></p>\n<div class="charts">\n{figures}</div>\n{_differences(runs, rows)}'
    )
    styles = f"{charts.STYLE}{STYLE}"
    remedy = "choose another --output_dir"
    return write_page(folder / FILE, title, body, style=styles, script=charts.SCRIPT, remedy=remedy)


def _runs(runs: Sequence[Run], along: str, at: Sequence[int]) -> str:
    rows = "".join(
        f"<tr><td>{place}</td><td>{html.escape(run.name)}</td><td>{html.escape(run.checkpoint)}</td></tr>\n"
        for place, run in zip(at, runs, strict=True)
    )
    return f'<table class="plain">\n<tr><th>{along}</th><th>evaluation</th><th>checkpoint</th></tr>\n{rows}</table>\n'


def _chart(metric: str, runs: Sequence[Run], along: str, at: Sequence[int]) -> str:
    """One curve; runs lie in the order of their steps, whatever the order in which they were given."""
    points = sorted(zip(at, (run.records[metric] for run in runs), strict=True), key=lambda point: point[0])
    values = [record.value for _, record in points if record.value is not None]
    spans = [record.ci95 for _, record in points if record.ci95 is not None]
    whole = spans if len(spans) == len(points) else None
    return chart(metric, [Curve("", [place for place, _ in points], values, spans=whole)], along=along)


def _differences(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("metric", "run", "difference", "95 %", "clips", ""))
    told = "".join(
        f"<tr><td>{html.escape(row.metric)}</td><td>{html.escape(row.run)}</td>"
        f'<td class="{"sure" if row.sure else "open"}">{row.difference:+.4g}</td>'
        f"<td>{interval(row.ci95)}</td><td>{row.how}</td><td><small>{html.escape(row.note)}</small></td></tr>\n"
        for row in rows
    )
    return (
        f"<h2>Differences from {html.escape(runs[0].name)}</h2>\n<p><small>Bold where the interval leaves out 0; pairs "
        f'are clips of one prompt and seed.</small></p>\n<table class="plain">\n<tr>{head}</tr>\n{told}</table>\n'
    )
