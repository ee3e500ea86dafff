"""Curves as inline SVG: no library, no file besides, and under the pointer the numbers."""

from __future__ import annotations

import html
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 190, 58, 8, 8, 20  # of a chart and of the margins about its curves
COLOURS = ("#1f6fb4", "#d1603d", "#3a8f4e", "#8a5fb0", "#8c6d31", "#c2528b")
MOST_POINTS = 400  # of a curve; more are averaged in as many stretches
FEW_POINTS = 40  # that each are marked
SPREAD = 30.0  # largest over smallest, from which the axis is logarithmic
STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 1em }
.chart { padding: .5em } .chart svg { width: 100%; display: block; touch-action: none }
.chart text { font: 10px system-ui, sans-serif; fill: #666 } .chart b { font-weight: 600 }
.chart span { margin-right: .9em; white-space: nowrap; font-size: 12px } .chart i { font-style: normal }
"""
SCRIPT = """
for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector("svg"), rule = svg.querySelector(".rule"), at = chart.querySelector("i");
  const { along, first, last, left, right, width, lines } = JSON.parse(chart.dataset.curves);
  const values = [...chart.querySelectorAll("span output")], shown = values.map(one => one.textContent);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * width;
    const step = first + (x - left) / (right - left) * (last - first);
    const near = lines.map(points => points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
    near.forEach((point, i) => values[i].textContent = point[1]);
    const place = left + (near[0][0] - first) / (last - first || 1) * (right - left);
    rule.setAttribute("x1", place); rule.setAttribute("x2", place); rule.style.display = "";
    at.textContent = ` at ${along} ${near[0][0]}`;
  });
  svg.addEventListener("pointerleave", () => {
    values.forEach((one, i) => one.textContent = shown[i]); at.textContent = ""; rule.style.display = "none";
  });
}
"""


@dataclass(frozen=True)
class Curve:
    """Values by step, in the order of the steps, and where there are any their standard errors, or the intervals that
    they lie in."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    errors: Sequence[float] | None = None
    spans: Sequence[tuple[float, float]] | None = None

    def sides(self) -> tuple[list[float], list[float]] | None:
        """The upper and the lower edge of what is shaded: the intervals, or two standard errors about the values."""
        if self.spans is not None:
            return [high for _, high in self.spans], [low for low, _ in self.spans]
        if self.errors is None:
            return None
        pairs = list(zip(self.values, self.errors, strict=True))
        return [v + 2.0 * e for v, e in pairs], [v - 2.0 * e for v, e in pairs]


def chart(title: str, curves: Sequence[Curve], *, along: str = "step") -> str:
    """A figure of some curves over the same steps, or what else they lie along, shaded where they have errors or spans.

    Every curve holds a point, and all values are finite.
    """
    curves = [_thinned(curve) for curve in curves]
    first = min(curve.steps[0] for curve in curves)
    last = max(curve.steps[-1] for curve in curves)
    axis = Axis.of([value for curve in curves for value in _extent(curve)])

    def place(step: float, value: float) -> str:
        x = LEFT + (step - first) / max(1, last - first) * (WIDTH - LEFT - RIGHT)
        return f"{x:.1f},{TOP + (1.0 - axis.share(value)) * (HEIGHT - TOP - BOTTOM):.1f}"

    drawn = "".join(_drawn(curve, COLOURS[i % len(COLOURS)], place) for i, curve in enumerate(curves))
    legend = "".join(
        f'<span style="color:{COLOURS[i % len(COLOURS)]}">{html.escape(curve.name)} '
        f"<output>{curve.values[-1]:.4g}</output></span> "
        for i, curve in enumerate(curves)
    )
    data = {
        **{"along": along, "first": first, "last": last, "left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH},
        "lines": [[[s, f"{v:.4g}"] for s, v in zip(c.steps, c.values, strict=True)] for c in curves],
    }
    return (
        f'<figure class="chart" data-curves="{html.escape(json.dumps(data, separators=(",", ":")))}">\n'
        f"<figcaption><b>{html.escape(title)}<i></i></b> {legend}</figcaption>\n"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{_grid(axis, first, last)}'
        f'{drawn}<line class="rule" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#999" style="display:none"/></svg>\n'
        "</figure>\n"
    )


@dataclass(frozen=True)
class Axis:
    """From the smallest to the largest value, by their logarithms where they are positive and far apart."""

    low: float
    high: float
    logarithmic: bool

    @staticmethod
    def of(values: Sequence[float]) -> Axis:
        low, high = min(values), max(values)
        if low > 0.0 and high > SPREAD * low:
            return Axis(low, high, True)
        margin = max((high - low or abs(high) or 1.0) * 0.05, sys.float_info.min)
        return Axis(low - margin, high + margin, False)

    def share(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1."""
        if self.logarithmic:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Four values, evenly apart."""
        if self.logarithmic:
            low, high = math.log(self.low), math.log(self.high)
            return [math.exp(low + (high - low) * i / 3) for i in range(4)]
        return [self.low + (self.high - self.low) * (i + 0.5) / 4 for i in range(4)]


def _grid(axis: Axis, first: int, last: int) -> str:
    parts, ticks = [], axis.ticks()
    # Where they are close together more digits are needed to tell them apart.
    digits = next((n for n in range(3, 7) if len({f"{value:.{n}g}" for value in ticks}) == len(ticks)), 7)
    for value in ticks:
        y = TOP + (1.0 - axis.share(value)) * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{value:.{digits}g}</text>')
    if axis.low < 0.0 < axis.high:
        y = TOP + (1.0 - axis.share(0.0)) * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#888"/>')
    for step, x, anchor in ((first, LEFT, "start"), (last, WIDTH - RIGHT, "end")):
        parts.append(f'<text x="{x}" y="{HEIGHT - 5}" text-anchor="{anchor}">{step}</text>')
    return "".join(parts)


def _drawn(curve: Curve, colour: str, place: Callable[[float, float], str]) -> str:
    points = [place(step, value) for step, value in zip(curve.steps, curve.values, strict=True)]
    parts = [f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.4"/>']
    if (sides := curve.sides()) is not None:
        upper, lower = ([place(s, v) for s, v in zip(curve.steps, side, strict=True)] for side in sides)
        parts.append(f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{colour}" opacity="0.15"/>')
    if len(points) <= FEW_POINTS:
        for x, y in (point.split(",") for point in points):
            parts.append(f'<circle cx="{x}" cy="{y}" r="2" fill="{colour}"/>')
    return "".join(parts)


def _extent(curve: Curve) -> list[float]:
    upper, lower = curve.sides() or ([], [])
    return [*curve.values, *upper, *lower]


def _thinned(curve: Curve) -> Curve:
    """At most MOST_POINTS points: the means of equal stretches."""
    size = -(-len(curve.steps) // MOST_POINTS)
    if size == 1:
        return curve
    starts = range(0, len(curve.steps), size)

    def means(values: Sequence[float]) -> list[float]:
        return [sum(part := values[i : i + size]) / len(part) for i in starts]

    steps, errors = [round(step) for step in means(curve.steps)], None if curve.errors is None else means(curve.errors)
    if curve.spans is None:
        return Curve(curve.name, steps, means(curve.values), errors)
    lows, highs = (means([span[side] for span in curve.spans]) for side in (0, 1))
    return Curve(curve.name, steps, means(curve.values), errors, list(zip(lows, highs, strict=True)))
