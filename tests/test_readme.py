"""The README says what the saved outputs say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.data import table

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


def test_the_tables_of_the_data_loader_are_the_saved_ones() -> None:
    record = saved("data-cpu.json")
    lines = table(record).splitlines()
    assert len(lines) == 17
    assert [line for line in lines if line not in README] == []
    ways = record["ways"]
    assert isinstance(ways, dict)
    ours, rivals = ways["loader"]["rate"], ("cv2 loop", "PyAV loop", "decord", "torchcodec")
    assert ways["loader, all augmentation"]["of_raw"] >= 0.8, "what we set out for"
    assert ours >= max(ways[name]["rate"] for name in rivals)
