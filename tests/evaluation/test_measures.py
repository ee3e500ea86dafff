"""Means, distances and scores of rows, with their intervals; the table of metrics and what each needs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import side

from vdm.errors import UserError
from vdm.evaluation import extract
from vdm.evaluation.catalogue import METRICS, chosen
from vdm.evaluation.clips import (
    Shape,
)
from vdm.evaluation.extract import Side, halves
from vdm.evaluation.extractors import EXTRACTORS
from vdm.evaluation.measures import Distance, PerClip, Score, Unmeasurable, column
from vdm.metrics.frechet import frechet_distance
from vdm.metrics.inception import inception_score
from vdm.metrics.intervals import Z95, jackknife, wilson


def test_a_mean_counts_only_clips_that_have_a_number() -> None:
    rows = side([[1.0], [math.nan], [3.0], [8.0]], ["a", "b", "a", "c"])
    found = column(0)(rows, rows)
    assert (found.value, found.count) == (4.0, 3)
    low, high = found.interval() or (0.0, 0.0)
    assert 2.0 <= low < 4.0 < high <= 8.0
    assert column(0)(side([[1.0], [2.0]], ["a", "a"]), rows).interval() is None, "one prompt says nothing of others"
    with pytest.raises(Unmeasurable, match="applies to none"):
        column(0)(side([[math.nan]]), rows)


def test_a_share_has_the_interval_of_wilson() -> None:
    rows = side([[1.0]] * 9 + [[0.0]])
    assert column(0, share=True)(rows, rows).interval() == wilson(9, 10)


def test_clips_of_one_prompt_do_not_make_a_share_surer() -> None:
    share, prompts = column(0, share=True), [f"{i % 6}" for i in range(60)]
    right = side([[float(i % 6 < 4)] for i in range(60)], prompts)
    found = share(right, right).interval()
    assert found is not None and found == column(0)(right, right).interval(), "the bootstrap over prompts"
    naive = wilson(40, 60)
    assert found[1] - found[0] > 1.5 * (naive[1] - naive[0])
    all_right, half = side([[1.0]] * 60, prompts), side([[float(i < 30)] for i in range(60)], prompts)
    assert share(all_right, right).interval() == wilson(6, 6) and share(half, right).interval() == wilson(3, 6)
    assert share(side([[1.0]] * 5, ["a"] * 5), right).interval() is None


def test_a_distance_is_that_of_the_features_whatever_their_order() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) + 1.0
    measure = Distance(frechet_distance, columns=(1, None), least=20, trusted=35)
    found = measure(side(x.tolist()), side(y.tolist()))
    assert found.value == pytest.approx(
        frechet_distance(torch.from_numpy(x[:, 1:]), torch.from_numpy(y[:, 1:])), abs=1e-12
    )
    low, high = found.interval() or (0.0, 0.0)
    assert low < found.value < high and not found.valid and found.values is None
    order = rng.permutation(40)
    shuffled = side(x.tolist())
    mixed = Side(tuple(shuffled.clips[i] for i in order), shuffled.rows[order])
    again = measure(mixed, side(y.tolist()))
    assert again.value == found.value and again.interval() == found.interval()
    with pytest.raises(Unmeasurable, match="needs at least 20 clips on each side, and there are 19"):
        measure(side(x[:19].tolist()), side(y.tolist()))


@pytest.mark.parametrize(("ours", "theirs", "blocks"), [(20, 40, 10), (40, 12, 6), (80, 40, 16)])
def test_blocks_of_a_jackknife_are_of_two_clips_at_least(ours: int, theirs: int, blocks: int) -> None:
    def square(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x.mean() - y.mean()) ** 2)

    x, y = (side(np.random.default_rng(n).normal(size=(n, 1)).tolist()) for n in (ours, theirs))
    found = Distance(square)(x, y)
    one, other = (
        torch.from_numpy(whole.rows[sorted(range(len(whole.clips)), key=lambda i: extract.digest(f"{i:04d}"))])
        for whole in (x, y)
    )
    low, high = found.interval() or (0.0, 0.0)
    assert (high - low) / 2 == pytest.approx(Z95 * jackknife(square, one, other, blocks=blocks))


def test_a_score_is_of_one_side_and_varies_with_that_alone() -> None:
    def mean(x: torch.Tensor) -> float:
        return float(x.mean())

    rows, other = side([[float(i)] for i in range(32)]), side([[1e6], [2e6]])
    found = Score(mean)(rows, other)
    low, high = found.interval() or (0.0, 0.0)
    # The block jackknife of a mean: the standard error of the 16 means of blocks, to which the other side adds nothing.
    values = np.array([row[0] for row in sorted(rows.rows, key=lambda row: extract.digest(f"{int(row[0]):04d}"))])
    error = values.reshape(16, 2).mean(1).std(ddof=1) / 4.0
    with pytest.raises(Unmeasurable, match="needs at least 33 clips"):
        Score(mean, least=33)(rows, rows)
    assert found.value == 15.5 and (high - low) / 2 == pytest.approx(1.959964 * error, rel=1e-5)


def test_the_spread_of_ten_shares_stands_beside_their_mean() -> None:
    rows = side(np.random.default_rng(0).normal(size=(40, 5)).tolist())
    ordered = sorted(range(40), key=lambda i: extract.digest(f"{i:04d}"))
    mean, spread = inception_score(torch.from_numpy(rows.rows[ordered]), splits=10, seed=0)
    found, beside = (METRICS[name].measure(rows, rows) for name in ("is_10_splits_std", "is_10_splits"))
    assert found.value == spread > 0.0 and found.interval() is None
    assert beside.value == mean and beside.interval() is not None
    with pytest.raises(Unmeasurable, match="at least 20 clips"):
        METRICS["is_10_splits_std"].measure(rows.part(range(19)), rows)
    with pytest.raises(Unmeasurable, match="at least 12 clips"):
        METRICS["is_10_splits"].measure(rows.part(range(11)), rows)
    assert all(METRICS["is_10_splits"].measure(rows.part(range(n)), rows).interval() for n in range(12, 40))


def test_the_ratio_to_real_clips_is_godivas() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (side((mean + 0.01 * rng.normal(size=(32, 4))).tolist()) for mean in (0.2, 0.25))
    measure = METRICS["clipsim_rm"].measure
    found = measure(ours, theirs)
    assert found.value == pytest.approx(ours.rows[:, 0].mean() / theirs.rows[:, 0].mean()) and not measure.one_sided
    low, high = found.interval() or (0.0, 0.0)
    assert low < 0.8 < high < 0.9 and low > 0.7
    assert measure(theirs, theirs).value == 1.0
    with pytest.raises(Unmeasurable, match="do not match their prompts"):
        measure(ours, side((-theirs.rows).tolist()))


def test_halves_are_apart_and_of_one_size() -> None:
    whole = side([[float(i)] for i in range(9)])
    assert [len(half.clips) for half in halves(whole, most=3)] == [3, 3]
    one, other = halves(whole, most=100)
    assert len(one.clips) == len(other.clips) == 4
    assert not {clip.id for clip in one.clips} & {clip.id for clip in other.clips}
    assert all(
        row[0] == float(clip.id) for half in (one, other) for clip, row in zip(half.clips, half.rows, strict=True)
    )


def test_every_metric_has_an_extractor_and_every_extractor_a_metric() -> None:
    assert {metric.extractor for metric in METRICS.values()} == set(EXTRACTORS) - {"thumbnail"}
    assert [metric.name for metric in chosen(["kvd", "fvd"])] == ["fvd", "kvd"] and len(chosen(None)) == len(METRICS)
    with pytest.raises(UserError, match="no metric 'frame_sim'; did you mean frame_ssim"):
        chosen(["frame_sim"])


def test_an_extractor_says_what_it_lacks(tmp_path: Path) -> None:
    shape = Shape(16, 8.0, 64, 64)
    assert EXTRACTORS["frames"].missing(tmp_path, shape) == ""
    assert EXTRACTORS["dino"].missing(tmp_path, shape) == (
        f"needs dino_vitbase16_pretrain.pth, put it at {tmp_path}/dino_vitbase16_pretrain.pth"
    )
    assert "(i3d_pretrained_400.pt will do as well)" in EXTRACTORS["i3d"].missing(tmp_path, shape)
    (tmp_path / "i3d_pretrained_400.pt").touch()
    (tmp_path / "c3d_ucf101.pt").touch()
    assert EXTRACTORS["i3d"].missing(tmp_path, shape) == ""
    assert EXTRACTORS["i3d"].find(tmp_path) == tmp_path / "i3d_pretrained_400.pt"
    assert "needs clips of 9 or more frames, and these have 8" in EXTRACTORS["i3d"].missing(
        tmp_path, Shape(8, 8, 64, 64)
    )
    assert "needs clips of 5 to 8 frames" in EXTRACTORS["i3d_rep2"].missing(tmp_path, shape)
    assert "needs clips of 16 frames, and these have 24" in EXTRACTORS["c3d"].missing(tmp_path, Shape(24, 8, 64, 64))
    assert "16 pixels a side or more, and these have 64x8" in EXTRACTORS["flows"].missing(tmp_path, Shape(16, 8, 8, 64))


def test_a_measure_may_look_at_the_reference() -> None:
    measure = PerClip(lambda one, reference: one.rows[:, 0] - reference.rows[:, 0].mean())
    assert measure(side([[3.0], [5.0]]), side([[1.0], [2.0]])).value == 2.5
