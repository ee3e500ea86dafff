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


def test_a_distance_has_its_floor_and_ceilings_from_two_halves_of_the_reference() -> None:
    generated, reference = numbers(4, 0), numbers(10, 1)
    measure = Distance(between, trusted=5)
    found = judged(metric(measure), OPENED, extracted(generated), extracted(reference), base={"T": 16})
    record = found.record
    one, other = halves(reference, most=4)
    assert len(one.clips) == 4 and record.floor == pytest.approx(one.rows.mean() - other.rows.mean())
    assert record.value == pytest.approx(generated.rows.mean() - reference.rows.mean())
    wanted = {look: record.floor + 10.0 * (i + 1) for i, look in enumerate(ALTERATIONS)}
    assert record.ceilings == pytest.approx(wanted), "of one half, altered, from the other as it is"
    assert (record.n_generated, record.n_reference, record.valid, record.off) == (4, 10, False, None)
    assert record.warnings[0] == "about the weights" and "not valid" in record.warnings[1]
    assert (record.weights_sha256, record.protocol["cov"], record.protocol["layer"]) == ("abc", "unbiased", "x")
    assert found.generated is None

    record = judged(metric(measure), OPENED, extracted(numbers(6, 0)), extracted(reference), base={}).record
    assert record.valid and "6 generated and 10 reference clips" in record.warnings[1]
    assert record.warnings[2] == "floor and ceilings are of 5 clips a side; of more they would be lower"


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
