"""What benchmarks/attn.py counts, and that every rival computes the same thing."""

from __future__ import annotations

import pytest
import torch

from benchmarks import attn, timing
from benchmarks.attn import Shape, core, error_of, layer, shapes
from benchmarks.attn_rivals import cores
from benchmarks.rows import PASSES, Row, table

CPU = torch.device("cpu")
TINY = Shape("L0", 2, 5, 4, 2, 16, "fp32")


def test_the_bytes_that_must_be_moved() -> None:
    one = 2 * 5 * 4 * 2 * 16 * 4
    assert [TINY.bytes(which) for which in PASSES] == [4 * one, 7 * one, 11 * one]


def test_all_places_of_the_unet_and_odd_lengths_are_measured() -> None:
    found = list(shapes())
    assert len(set(found)) == len(found)
    assert {shape.place for shape in found} == set(attn.PLACES)
    assert {16, 24, 8, 17, 32} <= {shape.frames for shape in found} and {64, 40} == {s.head_dim for s in found}


@pytest.mark.parametrize("name", ["vdm sdpa", "einsum", "flash", "math"])
def test_rivals_compute_attention_over_frames(name: str) -> None:
    rival = next(rival for rival in cores(CPU, compiled=False) if rival.name == name)
    assert error_of(rival, TINY.qkv(CPU)) < 1e-5


def test_what_is_not_supported_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.REPEATS, "cpu", 2)
    rows = core(TINY, CPU, 1e9, compiled=False)
    timed = [row for row in rows if row.ms is not None]
    assert {row.which for row in timed} == set(PASSES)
    assert {row.name for row in rows if row.unsupported} == {"efficient", "cudnn"}
    assert all(row.of_copy == pytest.approx(row.gb_per_s) for row in timed)  # of 1 GB/s
    lines = list(table(rows))
    assert len(lines) == len(rows) + 1 and sum("backend" in line for line in lines) == 2


@pytest.mark.slow
def test_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.REPEATS, "cpu", 2)
    rows = layer(Shape("L0", 1, 3, 4, 2, 32, "fp32"), CPU, compiled=False)
    ours: list[Row] = [row for row in rows if row.name == "vdm sdpa"]
    assert [row.which for row in ours] == list(PASSES)
    assert all(row.ours_is_faster == 1.0 and row.level == "layer" for row in ours)
