"""One line of a metric as inline SVG: where its value lies between floor and ceilings, and how sure that is."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from vdm.evaluation.records import Record, number

WIDTH, HEIGHT, MARGIN, MIDDLE = 320, 36, 12, 12
LETTER = 7  # as wide as a letter, with room beside it
MARKS = {  # colour and letter of what is beside the value
    "floor": ("#777777", "f"),
    "reference": ("#3a8f4e", "r"),
    "frozen": ("#8a5fb0", "z"),
    "shuffled": ("#d1603d", "s"),
    "noise": ("#8c6d31", "n"),
    "chance": ("#c2528b", "c"),
}
VALUE = "#1f6fb4"
STYLE = """
.bar { width: 320px; display: block } .bar text { font: 10px system-ui, sans-serif }
.legend { margin: .4em 0 } .legend i { font-style: normal; margin-right: 1.2em; font-size: 13px }
"""


def bar(record: Record) -> str:
    """The value as a dot on its interval, floor and ceilings as marked strokes; nothing for a metric without value."""
    if record.value is None:
        return ""
    places = dict(record.ceilings)
    # Of a metric of single clips the floor is a difference, and has no place among values.
    if record.floor is not None and "reference" not in places:
        places["floor"] = record.floor
    ends = [record.value, *places.values(), *(record.ci95 or ())]
    low, high = min(ends), max(ends)
    span = (high - low) or abs(high) or 1.0

    def x(value: float) -> str:
        return f"{MARGIN + (value - low) / span * (WIDTH - 2 * MARGIN):.1f}"

    def stroke(name: str, value: float) -> str:
        colour, _ = _mark(name)
        return (
            f'<g stroke="{colour}"><title>{html.escape(name)} {number(value)}</title>'
            f'<line x1="{x(value)}" x2="{x(value)}" y1="{MIDDLE - 8}" y2="{MIDDLE + 8}" stroke-width="2"/></g>'
        )

    parts = [f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{MIDDLE}" y2="{MIDDLE}" stroke="#ddd"/>']
    parts += [stroke(name, value) for name, value in places.items()]
    parts += _letters([(float(x(value)), name) for name, value in places.items()])
    if record.ci95 is not None and all(map(math.isfinite, record.ci95)):
        left, right = map(x, record.ci95)
        line = f'<line x1="{left}" x2="{right}" y1="{MIDDLE}" y2="{MIDDLE}" stroke="{VALUE}" stroke-width="5"'
        parts.append(f'{line} opacity="0.45"/>')
    parts.append(
        f'<g fill="{VALUE}"><title>generated {number(record.value)}</title>'
        f'<circle cx="{x(record.value)}" cy="{MIDDLE}" r="5"/></g>'
    )
    label = html.escape(f"{record.metric} {number(record.value)}")
    return f'<svg class="bar" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _mark(name: str) -> tuple[str, str]:
    return MARKS.get(name, ("#444444", name[:1]))


def _letters(marks: Sequence[tuple[float, str]]) -> list[str]:
    """The letters of marks (place, name) below them; those that would lie over each other side by side."""
    groups: list[tuple[float, list[str]]] = []  # the middle of each, and whose letters
    for place, name in sorted(marks):
        middle, names = place, [name]
        while groups and middle - groups[-1][0] < LETTER * (len(names) + len(groups[-1][1])) / 2:
            before, others = groups.pop()
            total = len(names) + len(others)
            middle, names = (middle * len(names) + before * len(others)) / total, [*others, *names]
        groups.append((middle, names))
    return [
        f'<text x="{middle:.1f}" y="{MIDDLE + 20}" text-anchor="middle">'
        + "".join(f'<tspan fill="{_mark(name)[0]}">{_mark(name)[1]}</tspan>' for name in names)
        + "</text>"
        for middle, names in groups
    ]


def legend() -> str:
    """What the marks of all bars mean."""
    marks = "".join(f'<i style="color:{colour}">{letter}: {name}</i>' for name, (colour, letter) in MARKS.items())
    return f'<p class="legend"><i style="color:{VALUE}">dot: generated, with its 95 % interval</i>{marks}</p>\n'
