"""Curves as SVG: every point where its numbers say, and the numbers beside it."""

from __future__ import annotations

import html
import json
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdm.charts import BOTTOM, HEIGHT, LEFT, MOST_POINTS, RIGHT, TOP, WIDTH, Axis, Curve, chart

VALUES = st.floats(-1e12, 1e12)


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def points(figure: ElementTree.Element, tag: str = "polyline") -> list[list[tuple[float, float]]]:
    found = [line.get("points", "") for line in figure.iter(tag)]
    return [[tuple(map(float, pair.split(","))) for pair in text.split()] for text in found]  # type: ignore[misc]


@settings(max_examples=30)
@given(st.lists(VALUES, min_size=1, max_size=30))
def test_points_lie_in_the_frame_in_the_order_of_their_values(values: list[float]) -> None:
    ((drawn),) = points(parsed(chart("a", [Curve("a", list(range(len(values))), values)])))
    assert len(drawn) == len(values)
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in drawn)
    for (_, y1), (_, y2), v1, v2 in zip(drawn, drawn[1:], values, values[1:], strict=False):
        assert y1 == y2 or (y1 > y2) is (v1 < v2), "up is more"


def test_both_ends_and_the_middle_by_hand() -> None:
    (line,) = points(parsed(chart("a", [Curve("a", [0, 50, 100], [0.0, 1.0, 2.0])])))
    inner = (HEIGHT - TOP - BOTTOM) / 1.1  # a twentieth of the range above and below
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    expected = [(LEFT, middle + inner / 2), ((LEFT + WIDTH - RIGHT) / 2, middle), (WIDTH - RIGHT, middle - inner / 2)]
    for found, wanted in zip(line, expected, strict=True):
        assert found == pytest.approx(wanted, abs=0.06)


def test_values_far_apart_are_drawn_by_their_logarithms() -> None:
    axis = Axis.of([1e-6, 1e-4, 1e-2])
    assert axis.logarithmic and axis.share(1e-4) == pytest.approx(0.5)
    assert axis.ticks() == pytest.approx([1e-6, 10 ** (-14 / 3), 10 ** (-10 / 3), 1e-2])
    assert not Axis.of([-1e-6, 1e-2]).logarithmic and not Axis.of([1.0, 2.0]).logarithmic


def test_errors_are_a_band_of_two_on_either_side() -> None:
    figure = parsed(chart("a", [Curve("a", [0, 1], [0.0, 0.0], [1.0, 2.0])]))
    ((band),) = points(figure, "polygon")
    (line,) = points(figure)
    zero = line[0][1]
    assert [round((zero - y) / (zero - band[0][1]), 1) for _, y in band] == [1.0, 2.0, -2.0, -1.0]


@settings(max_examples=10)
@given(st.integers(1, 5 * MOST_POINTS))
def test_long_curves_are_thinned_and_keep_their_mean(count: int) -> None:
    values = [float(i % 7) for i in range(count)]
    figure = parsed(chart("a", [Curve("a", list(range(count)), values)]))
    assert len(points(figure)[0]) <= MOST_POINTS
    data = json.loads(figure.get("data-curves", ""))
    shown = [float(value) for _, value in data["lines"][0]]
    assert min(values) <= min(shown) and max(shown) <= max(values)
    if count <= MOST_POINTS:
        assert shown == values


def test_the_numbers_beside_the_curve_are_the_last_ones() -> None:
    text = chart("a <b>", [Curve("x & y", [1, 2], [0.5, 0.25]), Curve("z", [2], [math.pi])])
    figure = parsed(text)
    assert [output.text for output in figure.iter("output")] == ["0.25", "3.142"]
    assert "x &amp; y" in text and html.escape("a <b>") in text
    assert re.findall(r">(\d+)</text>$|>(\d+)</text><", text)
    assert json.loads(figure.get("data-curves", ""))["lines"][1] == [[2, "3.142"]]


def test_spans_are_shaded_as_they_are_and_widen_the_axis() -> None:
    spans = [(0.5, 1.25), (1.0, 4.0)]
    figure = parsed(chart("a", [Curve("a", [3, 5], [1.0, 2.0], spans=spans)], along="run"))
    (band,), (line,) = points(figure, "polygon"), points(figure)
    assert json.loads(figure.get("data-curves", ""))["along"] == "run"
    scale = (line[0][1] - line[1][1]) / 1.0  # pixels that 1 takes
    heights = [1.0 + (line[0][1] - y) / scale for _, y in band]
    assert heights == pytest.approx([1.25, 4.0, 1.0, 0.5], abs=0.01)
    assert [x for x, _ in band] == [LEFT, WIDTH - RIGHT, WIDTH - RIGHT, LEFT]
    assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in band)
    count = 2 * MOST_POINTS
    many = [(float(i), float(i + 2)) for i in range(count)]
    thinned = parsed(chart("a", [Curve("a", list(range(count)), [i + 1.0 for i in range(count)], spans=many)]))
    assert len(points(thinned, "polygon")[0]) == 2 * len(points(thinned)[0]) == 2 * MOST_POINTS


def test_ticks_close_together_can_be_told_apart() -> None:
    for low, high, wanted in ((3.996, 4.0, 4), (0.0, 1.0, 3)):
        ticks = [text.text or "" for text in parsed(chart("a", [Curve("a", [0, 1], [low, high])])).iter("text")][:4]
        assert len(set(ticks)) == 4 and ticks == [f"{float(tick):.{wanted}g}" for tick in ticks]
