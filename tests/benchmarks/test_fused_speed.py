"""What benchmarks/fused.py counts, and that what it compares computes the same thing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import timing
from benchmarks.fused import Case, cases, error_of, rows_of
from benchmarks.rows import PASSES, set_bandwidth
from vdm.models.operations import PLAIN

CPU = torch.device("cpu")


def small() -> list[Case]:
    """The cases of level 0 at a size for tests."""
    less = {1024: 2, 320: 32, 2560: 40}
    found = [case for case in cases(1) if case.place == "L0"]
    return [replace(c, sizes=tuple(tuple(less.get(n, min(n, 20)) for n in size) for size in c.sizes)) for c in found]


def test_every_kernel_but_attention_is_measured() -> None:
    assert {case.name.split(",")[0] for case in cases(1)} == {"geglu", "group norm + silu", "add + layer norm"}
    assert len({str(case) for case in cases(4)}) == 12


@pytest.mark.parametrize("case", small(), ids=str)
def test_it_is_compared_with_the_same_thing(case: Case) -> None:
    assert error_of(case, case.apply(PLAIN), case.tensors(CPU, torch.float32)) < 1e-5


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.REPEATS, "cpu", 2)
    case = small()[0]
    rows = rows_of(case, {"vdm": PLAIN, "pytorch": PLAIN}, CPU, torch.float32)
    assert {(row.name, row.which) for row in rows} >= {(name, p) for name in ("vdm", "pytorch") for p in PASSES}
    set_bandwidth(rows, 1e9, lambda which: case.bytes(which, 4))
    moved = case.tensors(CPU, torch.float32)[0].nbytes * 1.5
    forward = next(row for row in rows if row.which == "forward")
    assert forward.ms is not None and forward.gb_per_s == pytest.approx(moved / forward.ms / 1e6)
