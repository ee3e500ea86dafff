"""The README says what the saved outputs say."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def saved(name: str) -> dict[str, object]:
    record: dict[str, object] = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
    return record


def test_the_table_of_parity_is_the_saved_one() -> None:
    rows = saved("parity-cpu.json")["rows"]
    assert isinstance(rows, list) and len(rows) == 20
    for row in rows:
        assert f"| {row['what']} | {row['against']} | {row['error']:.1e} | {row['detail']} |" in README, row["what"]
        assert row["error"] <= row["bound"]
