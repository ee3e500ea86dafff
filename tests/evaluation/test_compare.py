"""Runs compared clip by clip, what is refused, and clips ranked."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from folders import a_record

from vdm.errors import UserError
from vdm.evaluation.catalogue import chosen
from vdm.evaluation.compare import compare
from vdm.evaluation.page import ranked
from vdm.evaluation.per_clip import Line, read_per_clip, write_per_clip
from vdm.evaluation.records import (
    Record,
    make_record,
    with_lines,
    write_records,
)
from vdm.metrics.intervals import paired_difference


def a_run(folder: Path, values: Sequence[float], *, seeds: Sequence[int] | None = None, fps: float = 8.0) -> Path:
    lines = [
        Line("generated", f"{i}", f"prompt {i % 10}", i if seeds is None else seeds[i], values={"ssim": value})
        for i, value in enumerate(values)
    ]
    folder.mkdir()
    sha256 = write_per_clip(folder, [*lines, Line("reference", "r", "prompt 0", None, values={"ssim": 100.0})])
    mean = float(np.mean(values))
    records = [a_record(mean, "ssim", fps=fps), a_record(mean, "fvd", fps=fps)]
    records.append(make_record(Record("is", None, status="skipped: needs x"), {}))
    write_records(folder, with_lines(records, sha256))
    return folder


def test_runs_are_compared_clip_by_clip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=40) * 10.0
    runs = [a_run(tmp_path / "a", values.tolist()), a_run(tmp_path / "b", (values + 1.0).tolist())]
    runs.append(a_run(tmp_path / "c", (values + rng.normal(size=40))[:30].tolist()))
    first, second, third, fourth = compare(runs, tmp_path / "out")
    assert (first.metric, first.how, first.num_pairs, first.note) == ("ssim", "paired", 40, "")
    assert first.difference == pytest.approx(1.0) and first.ci95 == pytest.approx((1.0, 1.0))
    assert (second.num_pairs, second.note) == (30, "10 clips have no partner")
    assert second.ci95 is not None and second.ci95[0] < 0 < second.ci95[1]
    assert (third.metric, third.how, third.num_pairs) == ("fvd", "unpaired", None)
    half = math.hypot(0.5, 0.5)
    assert third.difference == pytest.approx(1.0) and third.ci95 == pytest.approx((1.0 - half, 1.0 + half))
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [one["metric"] for one in content] == ["ssim", "ssim", "fvd", "fvd"] and fourth.other.endswith("c")


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    a, b = a_run(tmp_path / "a", [1.0, 2.0]), a_run(tmp_path / "b", [1.0, 2.0], fps=24.0)
    with pytest.raises(UserError, match="ssim was not measured alike.* fps 8.0 and 24.0"):
        compare([a, b], tmp_path)
    for folders in ([a], [a, a], [a, tmp_path / "a" / ".." / "a"]):
        with pytest.raises(UserError, match="two different folders or more"):
            compare(folders, tmp_path)
    c = a_run(tmp_path / "c", [1.0, 2.0], seeds=[7, 8])
    assert "prompts and seeds" in compare([a, c], tmp_path)[0].note
    skipped = make_record(Record("is", None, status="skipped: needs x"), {})
    write_records(c, with_lines([skipped], read_per_clip(c)[1]))
    with pytest.raises(UserError, match="no metric in common"):
        compare([a, c], tmp_path)
    (c / "per_clip.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="per_clip.jsonl cannot be read"):
        compare([a, c], tmp_path)
    assert not (tmp_path / "metrics.json").exists()


def test_files_of_two_evaluations_are_refused(tmp_path: Path) -> None:
    a, b = a_run(tmp_path / "a", [1.0, 2.0]), a_run(tmp_path / "b", [1.0, 2.5])
    for text in ((a / "per_clip.jsonl").read_text(), ""):
        (b / "per_clip.jsonl").write_text(text)
        with pytest.raises(UserError, match="metrics.json and per_clip.jsonl in .*b are not of one evaluation"):
            compare([a, b], tmp_path)


def test_the_interval_is_that_of_pairs_by_as_many_draws_as_a_single_run_has(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(2, 40)).tolist()
    runs = [a_run(tmp_path / f"{i}", one) for i, one in enumerate(values)]
    pairs = [{(f"prompt {i % 10}", i): value for i, value in enumerate(one)} for one in values]
    wanted = paired_difference(pairs[1], pairs[0], seed=0, draws=2000)
    assert compare(runs, tmp_path / "out")[0].ci95 == (wanted.low, wanted.high)


def test_clips_are_ranked_by_what_has_a_better_and_a_worse() -> None:
    lines = [
        Line("generated", "a", "", 0, values={"ms_flow": 0.9, "warping_error": 0.1, "frame_ssim": 0.0}),
        Line("generated", "b", "", 0, values={"ms_flow": 0.5, "warping_error": 0.5, "frame_ssim": 1.0}),
        Line("generated", "c", "", 0, values={"ms_flow": 0.7, "frame_ssim": 1.0}),
        Line("generated", "d", "", 0, problem="d cannot be read"),
        Line("reference", "e", "", None, values={"ms_flow": 1.0}),
    ]
    names, order = ranked(chosen(["ms_flow", "warping_error", "frame_ssim"]), lines)
    assert names == ["ms_flow", "warping_error"] and [line.id for line in order] == ["a", "c", "b"]
    assert [line.id for line in ranked(chosen(["frame_ssim"]), lines)[1]] == ["a", "b", "c"]
