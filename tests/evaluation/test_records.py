"""Records: hashes that tell what may be compared, and files that give back what was written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from folders import a_record
from hypothesis import given, settings
from hypothesis import strategies as st

from vdm.errors import UserError
from vdm.evaluation.records import (
    OUTCOMES,
    PROTOCOL_KEYS,
    Record,
    make_record,
    protocol_hash,
    read_records,
    require_comparable,
    table,
    write_records,
)


def test_a_hash_is_that_of_canonical_json_without_what_came_out() -> None:
    text = '{"T":16,"metric":"a \\u00e9","resize":null}'
    protocol = {
        "resize": None,
        "n_gen": 5,
        "metric": "a \u00e9",
        "T": 16,
        "warnings": ["x"],
        "valid": True,
        "n_real": 9,
    }
    assert protocol_hash(protocol) == hashlib.sha256(text.encode()).hexdigest()


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(PROTOCOL_KEYS), st.none() | st.integers() | st.text()), st.data())
def test_a_hash_changes_with_all_but_the_outcomes(protocol: dict[str, object], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(PROTOCOL_KEYS))
    changed = {**protocol, key: "something else entirely"}
    assert (protocol_hash(changed) == protocol_hash(protocol)) == (key in OUTCOMES)
    assert protocol_hash(dict(reversed(protocol.items()))) == protocol_hash(protocol)


def test_outcomes_are_these_and_no_others() -> None:
    assert {"n_real", "n_gen", "checkpoint", "valid", "warnings", "per_clip_sha256"} == OUTCOMES


def test_a_record_says_in_its_protocol_what_it_says_outside() -> None:
    protocol = a_record().protocol
    assert set(PROTOCOL_KEYS) <= set(protocol)
    assert (protocol["n_real"], protocol["n_gen"], protocol["valid"]) == (9, 8, True)
    assert (protocol["warnings"], protocol["weights_sha256"], protocol["metric"]) == (["w"], "ab", "fvd")


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    records = [a_record(), make_record(Record("is", None, status="skipped: needs x"), {"T": 16})]
    write_records(tmp_path, records)
    assert list(read_records(tmp_path).values()) == records
    content = json.loads((tmp_path / "metrics.json").read_text())
    keys = "metric value ci95 n_generated n_reference floor ceilings valid status warnings protocol protocol_hash"
    assert list(content[0]) == [*keys.split(), "weights_sha256"]
    content[0]["protocol"]["fps"] = 24.0
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="the hash of fvd in .* is not that of its protocol"):
        read_records(tmp_path)
    for broken in ("{", "[1]", '[{"metric": "fvd"}]', "{}" * 2):
        (tmp_path / "metrics.json").write_text(broken)
        with pytest.raises(UserError, match="evaluate anew"):
            read_records(tmp_path)


def test_records_of_other_protocols_are_not_compared() -> None:
    require_comparable([a_record(1.0), a_record(2.0)])
    more = replace(a_record(), n_generated=7)
    require_comparable([a_record(), make_record(more, more.protocol)])
    with pytest.raises(UserError, match="fvd was not measured alike.*: fps 8.0 and 24.0; evaluate"):
        require_comparable([a_record(), a_record(fps=24.0)])


def test_the_table_groups_what_is_said_of_several() -> None:
    records = [a_record(), a_record(name="kvd"), make_record(Record("is", None, status="skipped: needs x"), {})]
    text = table(records)
    assert "| fvd | 1.5 | 1 to 2 | - | 0.1 | 3 | 8 | 9 | yes |" in text
    assert "- is: skipped: needs x\n" in text and "- all: w\n" in text
    beside = replace(a_record(2.0), ceilings={"reference": 2.5}, warnings=("another",))
    assert "| 2 | 1 to 2 | 0.5 |" in table([beside]) and "- fvd: another\n" in table([beside, records[1]])
    assert "skipped: needs x" in table(records[2:]) and "|" not in table(records[2:])
