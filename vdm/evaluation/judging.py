"""A metric and the rows of both sides to a record: value, interval, floor, ceilings, and what speaks against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vdm.errors import Failure, UserError
from vdm.evaluation.altered import ALTERATIONS
from vdm.evaluation.catalogue import Metric
from vdm.evaluation.extract import Extracted, Opened, Side, halves
from vdm.evaluation.measures import Distance, Found, Measure, PerClip, Score, Unmeasurable, Values
from vdm.evaluation.records import Record, make_record

MOST_NAMED = 20  # clips that were left out; per_clip.jsonl has all
FEW_PROMPTS = 20  # below which a bootstrap is too narrow
PROBLEMS = (Unmeasurable, UserError, Failure)


@dataclass(frozen=True)
class Judged:
    """A record, and what single clips of both sides got, where they get something."""

    record: Record
    generated: Values | None = None
    reference: Values | None = None


def skipped(metric: Metric, reason: str, protocol: Mapping[str, object], *, weights: str | None = None) -> Judged:
    """A metric without value."""
    record = Record(metric.name, None, status=f"skipped: {reason}", weights_sha256=weights)
    return Judged(make_record(record, {**protocol, **metric.protocol}))


def judged(
    metric: Metric, extractor: Opened, ours: Extracted, theirs: Extracted, *, base: Mapping[str, object]
) -> Judged:
    """What a metric makes of the generated side; skipped where there are too few clips, or none that it is for."""
    protocol = {**base, **extractor.protocol, **metric.protocol}
    generated, reference, *others = (
        replace(side, texts=extractor.texts)
        for side in (ours.side(metric.extractor), *(theirs.side(metric.extractor, look) for look in ("", *ALTERATIONS)))
    )
    try:
        found = metric.measure(generated, reference)
        interval = found.interval()
    except PROBLEMS as problem:  # of one metric, which the others do not share
        return skipped(metric, str(problem), protocol, weights=extractor.sha256)
    beside = _try(metric.measure, reference, reference) if metric.measure.one_sided else None
    altered = dict(zip(ALTERATIONS, others, strict=True))
    doubled = _doubled(generated, reference)
    by_chance = {} if found.chance is None else {"chance": found.chance}
    record = Record(
        metric.name,
        found.value,
        interval,
        n_generated=found.count,
        n_reference=len(reference.clips) if not metric.measure.one_sided else beside.count if beside else 0,
        floor=_floor(metric.measure, reference, most=len(generated.clips)),
        ceilings=by_chance | _ceilings(metric.measure, reference, altered, most=len(generated.clips)),
        valid=found.valid and not (doubled and isinstance(metric.measure, Distance | Score)),
        warnings=(*doubled, *_warnings(metric.measure, found, generated, reference, extractor.warning)),
        weights_sha256=extractor.sha256,
    )
    return Judged(make_record(record, protocol), found.values, beside.values if beside else None)


def with_notes(judged: Judged, notes: Sequence[str]) -> Judged:
    """With what is to be said of every metric, first: the clips that were left out."""
    told = list(notes[:MOST_NAMED])
    if len(notes) > MOST_NAMED:
        told.append(f"{len(notes) - MOST_NAMED} more clips were left out; per_clip.jsonl names them")
    record = judged.record
    if not record.ok or not told:
        return judged
    warned = replace(record, warnings=(*told, *record.warnings))
    return replace(judged, record=make_record(warned, record.protocol))


def _try(measure: Measure, generated: Side, reference: Side) -> Found | None:
    try:
        return measure(generated, reference)
    except PROBLEMS:
        return None


def _floor(measure: Measure, reference: Side, *, most: int) -> float | None:
    """What half of the reference makes of the other half, as far as can be of the size of the generated side: their
    distance, or how far apart their values are."""
    one, other = halves(reference, most=most)
    there, back = _try(measure, one, other), _try(measure, other, one)
    if there is None or back is None:
        return None
    return abs(there.value - back.value) if measure.one_sided else there.value


def _ceilings(measure: Measure, reference: Side, altered: Mapping[str, Side], *, most: int) -> dict[str, float]:
    """The values of the reference and of the altered reference; of a distance, those of one altered half from the other
    as it is, which the floor compares with: of the same clips altered it would be less than of others."""
    looks = {"reference": reference, **altered} if measure.one_sided else dict(altered)
    if not measure.one_sided:
        looks = {name: halves(side, most=most)[0] for name, side in looks.items()}
        reference = halves(reference, most=most)[1]
    found = {name: _try(measure, side, reference) for name, side in looks.items()}
    return {name: one.value for name, one in found.items() if one is not None}


def _doubled(generated: Side, reference: Side) -> list[str]:
    """Which of the clips feign a larger set, or a better one: a distance of sets means nothing with these in it."""
    ours, theirs = [clip.sha256 for clip in generated.clips], {clip.sha256 for clip in reference.clips}
    told = []
    if copies := sum(sha256 in theirs for sha256 in ours):
        told.append(f"{copies} of {len(ours)} generated clips are files of the reference, byte for byte")
    if twins := len(ours) - len(set(ours)):
        told.append(f"{twins} of {len(ours)} generated clips have the same bytes as another of them")
    return told


def _warnings(measure: Measure, found: Found, generated: Side, reference: Side, about_weights: str) -> list[str]:
    told = [about_weights] if about_weights else []
    shifts = isinstance(measure, Distance) and measure.shifts
    if not found.valid:
        told.append("there are fewer clips than features, so the value is not valid; look at the kernel distance")
    elif shifts and len(generated.clips) != len(reference.clips):
        counts = f"{len(generated.clips)} generated and {len(reference.clips)} reference clips"
        told.append(f"{counts}: compare only with values of the same numbers")
    if shifts and len(reference.clips) < 2 * len(generated.clips):
        told.append(f"floor and ceilings are of {len(reference.clips) // 2} clips a side; of more they would be lower")
    prompts = len({clip.prompt for clip in generated.clips})
    if isinstance(measure, PerClip) and not measure.share and prompts < FEW_PROMPTS:
        told.append(f"the interval is too narrow, being of {prompts} prompts only")
    return told
