"""Files of an evaluation that were edited by hand: one sentence for each, whatever is in them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from folders import a_record
from hypothesis import given, settings
from hypothesis import strategies as st

from vdm.errors import UserError
from vdm.evaluation.checked import WRONG, built
from vdm.evaluation.per_clip import Line, read_per_clip, write_per_clip
from vdm.evaluation.records import Record, protocol_hash, read_records, write_records

A_LINE = Line("generated", "a", "prompt", 3, "r", 1.5, {"ssim": 0.5})
DEEP = "[" * 10**5
HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("value", '"abc"'), ("value", "NaN"), ("value", "1e999"), ("value", HUGE), ("value", "-1e308"),
        ("value", "null"), ("value", "true"), ("value", DEEP), ("ci95", "[1]"), ("ci95", "[NaN, NaN]"), ("ci95", '"x"'),
        ("ci95", "[2, 1]"), ("ci95", "[1, 2, 3]"), ("n_generated", '"x"'), ("n_reference", "1.5"), ("floor", "[]"),
        ("ceilings", '{"frozen": "x"}'), ("ceilings", "[]"), ("valid", "1"), ("status", "null"),
        ("status", '"skipped: but it has a value"'), ("warnings", "[1]"), ("warnings", "{}"), ("metric", "[]"),
        ("protocol", '{"T": NaN}'), ("protocol", '{"T": 1e999}'), ("protocol", "[]"), ("protocol_hash", "1"),
        ("weights_sha256", "1"),
    ],
)  # fmt: skip
def test_a_record_that_was_edited_is_refused(tmp_path: Path, key: str, text: str) -> None:
    write_records(tmp_path, [a_record()])
    (entry,) = json.loads((tmp_path / "metrics.json").read_text())
    changed = json.dumps([{**entry, key: "PLACE"}]).replace('"PLACE"', text)
    (tmp_path / "metrics.json").write_text(changed)
    with pytest.raises(UserError, match="is not what vdm evaluate writes .* evaluate anew"):
        read_records(tmp_path)


def test_a_record_that_is_there_twice_or_has_other_keys_is_refused(tmp_path: Path) -> None:
    entry = json.loads(json.dumps(asdict(a_record())))
    for content in ([entry, entry], [{**entry, "more": 1}], [{k: entry[k] for k in list(entry)[1:]}], 3, None):
        (tmp_path / "metrics.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="is not what vdm evaluate writes"):
            read_records(tmp_path)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("values", "null"), ("values", '{"ssim": "x"}'), ("values", '{"ssim": null}'), ("values", '{"ssim": NaN}'),
        ("prompt", "[]"), ("seed", "true"), ("seed", '"1"'), ("side", "null"), ("distance", "1e999"), ("id", "3"),
        ("values", DEEP),
    ],
)  # fmt: skip
def test_a_line_that_was_edited_is_refused(tmp_path: Path, key: str, text: str) -> None:
    write_per_clip(tmp_path, [A_LINE])
    entry = json.loads((tmp_path / "per_clip.jsonl").read_text())
    (tmp_path / "per_clip.jsonl").write_text(json.dumps({**entry, key: "PLACE"}).replace('"PLACE"', text))
    with pytest.raises(UserError, match="per_clip.jsonl cannot be read"):
        read_per_clip(tmp_path)


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    lines = [A_LINE, Line("reference", "b", "\u00e9 \ud800", None, problem="cannot be read")]
    sha256 = write_per_clip(tmp_path, lines)
    assert read_per_clip(tmp_path) == (lines, sha256)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)


@settings(max_examples=40)
@given(SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2))
def test_whatever_is_taken_has_the_types_that_it_should(value: object) -> None:
    entry = json.loads(json.dumps(asdict(a_record())))
    for key in entry:
        try:
            record = built(Record, json.loads(json.dumps({**entry, key: value})))
            protocol_hash(record.protocol)
        except WRONG:
            continue
        assert record.value is None or type(record.value) is float
        assert record.ci95 is None or [type(one) for one in record.ci95] == [float, float]
        assert all(type(one) is str for one in (record.metric, record.status, *record.warnings))
