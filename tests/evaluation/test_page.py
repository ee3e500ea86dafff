"""What the page of an evaluation shows: marks that can be told apart, and each warning once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from folders import SHAPE, a_record
from hypothesis import given
from hypothesis import strategies as st

from vdm.data.video import write_video
from vdm.evaluation.bars import LETTER, MARGIN, MARKS, WIDTH, bar
from vdm.evaluation.catalogue import METRICS
from vdm.evaluation.clips import Clip
from vdm.evaluation.page import Content, _memorised, write_page
from vdm.evaluation.per_clip import Line
from vdm.evaluation.records import Record, make_record, notes_of

VALUES = st.floats(-1e6, 1e6)


@given(VALUES, st.dictionaries(st.sampled_from(sorted(MARKS)), VALUES), st.none() | st.tuples(VALUES, VALUES))
def test_every_mark_has_its_letter_and_none_lies_over_another(value, marks, interval) -> None:  # type: ignore[no-untyped-def]
    record = replace(a_record(value), ceilings=marks, floor=None, ci95=interval and tuple(sorted(interval)))
    figure = ElementTree.fromstring(bar(record))
    texts = sorted(figure.iter("text"), key=lambda text: float(text.get("x", "")))
    spans = [span.text for text in texts for span in text.iter("tspan")]
    assert sorted(spans) == sorted(MARKS[name][1] for name in marks)
    middles, halves = [float(text.get("x", "")) for text in texts], [len(text) * LETTER / 2 for text in texts]
    ends = [(middle - half, middle + half) for middle, half in zip(middles, halves, strict=True)]
    assert all(a[1] <= b[0] + 0.2 for a, b in zip(ends, ends[1:], strict=False))
    assert all(MARGIN <= float(line.get("x1", "")) <= WIDTH - MARGIN for line in figure.iter("line"))


def test_a_note_is_told_once_with_all_that_it_is_of() -> None:
    records = [a_record(), a_record(name="kvd"), make_record(Record("is", None, status="skipped: needs x"), {})]
    assert notes_of(records) == [("is", "skipped: needs x"), ("all", "w")]


def test_the_page_opens_with_the_table_and_shows_clips_bare(tmp_path: Path) -> None:
    frames = np.zeros((SHAPE.num_frames, SHAPE.height, SHAPE.width, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, fps=SHAPE.fps)
    clip = Clip("a", tmp_path / "a.mp4", "a prompt", "x")
    lines = [
        Line("generated", "a", "a prompt", 0, nearest="a", distance=1.0, values={"ms_flow": 0.5}),
        Line("reference", "a", "a prompt", None, nearest="a", distance=2.0),
    ]
    beside = replace(a_record(0.5, "ms_flow"), ceilings={"reference": 0.75}, valid=False)
    metrics = [METRICS["ms_flow"], METRICS["fvd"]]
    records = [beside, make_record(Record("fvd", None, status="skipped: needs x"), {})]
    text = write_page(tmp_path, Content(records, metrics, lines, [clip], [clip], SHAPE)).read_text()
    places = [text.index(word) for word in ("<h1>", 'class="legend"', "<b>ms_flow</b>", "<h2>Notes", "<h2>Clips")]
    assert places == sorted(places) and text.count("<h2>", 0, places[2]) == 0
    assert "<td><b>0.5</b><br>" in text and "not valid" in text and "<td>0.75</td>" in text
    assert text.count("<td>w</td>") == 1 and "<td>skipped: needs x</td>" in text
    assert text.count("<video ") == 2 and " controls" not in text.split("<video ", 1)[1]


def told_of_memory(ours: list[float], theirs: list[float], *, same: int = 0) -> str:
    lines = [
        *(Line("generated", f"g{i}", "a", 0, nearest="r0", distance=distance) for i, distance in enumerate(ours)),
        *(Line("reference", f"r{i}", "a", None, nearest="r0", distance=distance) for i, distance in enumerate(theirs)),
    ]
    generated, reference = (
        [Clip(f"{side}{i}", Path("x"), "a", f"{'r' if i < same else side}{i}") for i in range(len(distances))]
        for side, distances in (("g", ours), ("r", theirs))
    )
    return _memorised(Content([], [], lines, generated, reference, SHAPE))


def test_copies_are_counted_whatever_is_alike_in_the_reference() -> None:
    apart = [10.0] * 18
    assert "<p>2 of 4 generated clips are nearer to a reference clip than 5.0 grey" in told_of_memory(
        [1.0, 4.9, 5.1, 9.0], [10.0] * 2 + apart
    )
    assert "<p>2 of 4 " in told_of_memory([1.0, 4.9, 5.1, 9.0], [0.0] * 2 + [10.0] * 2 + apart), "a pair is alike"
    assert "<p>1 of 3 " in told_of_memory([0.0, 0.1, 0.2], [0.0] * 8), "all are alike"
    assert "<p>2 of 3 " in told_of_memory([6.0, 7.0, 8.0], [10.0] * 8, same=2)
