"""From rows to a record: value, floor, ceilings, warnings, and what is skipped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from folders import side

from vdm.errors import Failure
from vdm.evaluation.altered import ALTERATIONS
from vdm.evaluation.catalogue import METRICS, Metric
from vdm.evaluation.extract import Extracted, Opened, Side, halves
from vdm.evaluation.judging import MOST_NAMED, judged, skipped, with_notes
from vdm.evaluation.measures import Distance, Measure, PerClip, Score, column
from vdm.evaluation.records import Record
from vdm.metrics.frechet import frechet_distance

OPENED = Opened(lambda frames, prompts: np.zeros((len(frames), 1)), {"layer": "x"}, "abc", "about the weights")


def between(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(x.mean() - y.mean())


def total(x: torch.Tensor) -> float:
    return float(x.sum())


def extracted(whole: Side) -> Extracted:
    """Rows by one extractor, 10 more of frozen clips, 20 of shuffled and 30 of noisy ones."""
    added = {"": 0.0, **{look: 10.0 * (i + 1) for i, look in enumerate(ALTERATIONS)}}
    return Extracted(whole.clips, (), {(look, "a"): whole.rows + more for look, more in added.items()})


def metric(measure: Measure) -> Metric:
    return replace(METRICS["fvd"], name="m", extractor="a", measure=measure, protocol={"cov": "unbiased"})


def numbers(count: int, seed: int) -> Side:
    return side(np.random.default_rng(seed).normal(size=(count, 1)).tolist())


def test_a_distance_has_its_floor_and_ceilings_from_two_parts_of_the_reference() -> None:
    generated, reference = numbers(4, 0), numbers(10, 1)
    measure = Distance(between, trusted=5)
    found = judged(metric(measure), OPENED, extracted(generated), extracted(reference), base={"T": 16})
    record = found.record
    one = halves(reference, most=4)[0]
    rest = (reference.rows.sum() - one.rows.sum()) / 6
    assert len(one.clips) == 4 and record.floor == pytest.approx(one.rows.mean() - rest), "4 against the other 6"
    assert record.value == pytest.approx(generated.rows.mean() - reference.rows.mean())
    wanted = {look: record.floor + 10.0 * (i + 1) for i, look in enumerate(ALTERATIONS)}
    assert record.ceilings == pytest.approx(wanted), "of one part, altered, from the other as it is"
    assert (record.n_generated, record.n_reference, record.valid, record.off) == (4, 10, False, None)
    assert record.warnings[0] == "about the weights" and "not valid" in record.warnings[1]
    assert (record.weights_sha256, record.protocol["cov"], record.protocol["layer"]) == ("abc", "unbiased", "x")
    assert found.generated is None

    record = judged(metric(measure), OPENED, extracted(numbers(6, 0)), extracted(reference), base={}).record
    assert record.valid and "6 generated and 10 reference clips" in record.warnings[1]
    assert record.warnings[2].startswith("floor and ceilings are of 5 against 5 reference clips, fewer than the value")


def test_floor_and_value_of_a_frechet_distance_are_of_one_scale() -> None:
    def gaussian(count: int, seed: int, *, mean: float = 0.0) -> Side:
        return side((np.random.default_rng(seed).normal(size=(count, 48)) + mean).tolist())

    def record_of(generated: Side) -> Record:
        fvd = metric(Distance(frechet_distance))
        return judged(fvd, OPENED, extracted(generated), extracted(gaussian(800, 1)), base={}).record

    alike, worse = record_of(gaussian(80, 0)), record_of(gaussian(80, 0, mean=0.25))
    assert alike.floor == pytest.approx(alike.value, rel=0.1) and alike.floor == worse.floor
    assert worse.value is not None and worse.floor is not None and worse.value > 1.2 * worse.floor
    assert "floor and ceilings are of 80 against 720 reference clips" in alike.warnings


def test_a_score_has_the_references_own_at_its_number_of_clips() -> None:
    generated, reference = (side(np.random.default_rng(i).normal(size=(n, 5)).tolist()) for i, n in ((0, 30), (1, 90)))
    score = metric(Score(lambda x: float(len(x))))
    record = judged(score, OPENED, extracted(generated), extracted(reference), base={}).record
    assert record.ceilings == {"reference": 30.0, "frozen": 30.0, "shuffled": 30.0, "noise": 30.0}
    assert record.n_reference == 30 and "30 clips are few for 5 classes" in " ".join(record.warnings)
    record = judged(score, OPENED, extracted(reference), extracted(generated), base={}).record
    assert record.ceilings["reference"] == 30.0 and "few for" not in " ".join(record.warnings)
    assert "the reference's own score is of 30 clips only, and so lower than of 90" in record.warnings


def test_a_mean_has_those_of_the_whole_reference_beside_it() -> None:
    generated, reference = numbers(4, 0), numbers(10, 1)
    found = judged(metric(column(0)), OPENED, extracted(generated), extracted(reference), base={})
    record, mean = found.record, reference.rows.mean()
    assert record.ceilings == pytest.approx(
        {"reference": mean, "frozen": mean + 10, "shuffled": mean + 20, "noise": mean + 30}
    )
    one, other = halves(reference, most=4)
    assert record.floor == pytest.approx(abs(one.rows.mean() - other.rows.mean()))
    assert record.off == pytest.approx(abs(generated.rows.mean() - mean))
    assert record.warnings[-1] == "the interval is too narrow, being of 4 prompts only"
    assert found.generated is not None and found.generated.tolist() == generated.rows[:, 0].tolist()
    assert found.reference is not None and found.reference.tolist() == reference.rows[:, 0].tolist()


def test_a_kernel_distance_of_few_clips_is_not_valid() -> None:
    kvd = replace(METRICS["kvd"], extractor="a")
    for ours, theirs, valid in ((16, 16, True), (15, 40, False), (40, 15, False), (2, 2, False)):
        sides = [
            side(np.random.default_rng(n).normal(size=(count, 32)).tolist()) for n, count in enumerate((ours, theirs))
        ]
        record = judged(kvd, OPENED, *map(extracted, sides), base={}).record
        assert record.ok and record.valid == valid, (ours, theirs)
        assert ("there are fewer than 16 clips on a side, so the value is not valid" in record.warnings) != valid


def test_a_warning_says_whether_there_is_an_interval() -> None:
    rows = [[float(i % 3 > 0)] for i in range(12)]
    for prompts, sentence in (
        (["a"] * 12, "there is no interval, for clips of one prompt say nothing of others"),
        (["a", "b"] * 6, "the interval is too narrow, being of 2 prompts only"),
    ):
        for share in (False, True):
            given = extracted(side(rows, prompts))
            record = judged(metric(column(0, share=share)), OPENED, given, extracted(numbers(4, 1)), base={}).record
            assert record.warnings[-1] == sentence and (record.ci95 is None) == (prompts == ["a"] * 12)
    alone = metric(column(0, share=True))
    record = judged(alone, OPENED, extracted(side(rows)), extracted(numbers(4, 1)), base={}).record
    assert record.warnings == ("about the weights",), "Wilson's is not too narrow"


def test_what_applies_to_no_clip_is_skipped_and_what_applies_to_no_reference_stands_alone() -> None:
    nothing, some = side([[np.nan]] * 3), numbers(3, 0)
    record = judged(metric(column(0)), OPENED, extracted(nothing), extracted(some), base={}).record
    assert (record.value, record.status, record.valid) == (None, "skipped: it applies to none of the clips", False)
    record = judged(metric(column(0)), OPENED, extracted(some), extracted(nothing), base={}).record
    assert record.ok and (record.floor, record.ceilings, record.n_reference) == (None, {}, 0)


def test_a_clip_that_is_there_twice_is_told_of_and_makes_distances_of_sets_invalid() -> None:
    generated, reference = numbers(6, 0), numbers(8, 1)
    copied = replace(generated, clips=(*generated.clips[:4], *reference.clips[:2]))
    collapsed = replace(generated, clips=(*generated.clips[:4], *[replace(generated.clips[0], id=i) for i in "xy"]))
    for side_, sentence in (
        (generated, ""),
        (copied, "2 of 6 generated clips are files of the reference, byte for byte"),
        (collapsed, "2 of 6 generated clips have the same bytes as another of them"),
    ):
        for measure in (Distance(between), Score(total), column(0)):
            record = judged(metric(measure), OPENED, extracted(side_), extracted(reference), base={}).record
            assert (sentence in record.warnings) == bool(sentence)
            assert record.valid == (not sentence or isinstance(measure, PerClip)), (sentence, measure)


def test_what_goes_wrong_in_one_metric_skips_that_metric() -> None:
    bad = numbers(4, 0)
    bad.rows[0] = np.nan
    fvd = metric(Distance(frechet_distance))
    record = judged(fvd, OPENED, extracted(bad), extracted(numbers(4, 1)), base={}).record
    assert record.value is None and "skipped: " in record.status and "NaN" in record.status

    def fails(x: torch.Tensor, y: torch.Tensor) -> float:
        raise Failure("the network gave no features")

    record = judged(metric(Distance(fails)), OPENED, extracted(numbers(4, 0)), extracted(numbers(4, 1)), base={}).record
    assert record.status == "skipped: the network gave no features"


def test_notes_come_first_and_change_no_hash() -> None:
    found = judged(metric(column(0)), OPENED, extracted(numbers(4, 0)), extracted(numbers(4, 1)), base={})
    notes = [f"{i} was left out" for i in range(MOST_NAMED + 5)]
    told = with_notes(found, notes).record
    assert told.warnings[:MOST_NAMED] == tuple(notes[:MOST_NAMED])
    assert told.warnings[MOST_NAMED].startswith("5 more clips were left out")
    assert told.warnings[-1] == found.record.warnings[-1] and told.protocol["warnings"] == list(told.warnings)
    assert told.protocol_hash == found.record.protocol_hash
    bare = skipped(METRICS["fvd"], "needs x", {})
    assert with_notes(bare, notes) == bare and with_notes(found, []) == found
