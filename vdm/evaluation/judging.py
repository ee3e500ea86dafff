"""A metric and the rows of both sides to a record: value, interval, floor, ceilings, and what speaks against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vdm.errors import Failure, UserError
from vdm.evaluation.altered import ALTERATIONS
from vdm.evaluation.catalogue import Metric
from vdm.evaluation.extract import Extracted, Opened, Side, halves
from vdm.evaluation.measures import Distance, Found, Measure, PerClip, Score, Unmeasurable, Values
from vdm.evaluation.records import Record, digest, make_record

MOST_NAMED = 20  # clips that were left out; per_clip.jsonl has all
FEW_PROMPTS = 20  # below which a bootstrap is too narrow
CLIPS_A_CLASS = 10  # below which an Inception score is more of the number of clips than of these
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
    looks = {"reference": reference, **dict(zip(ALTERATIONS, others, strict=True))}
    if isinstance(metric.measure, Score):  # which grows with the number of clips
        looks = {name: _split(side, at=len(generated.clips))[0] for name, side in looks.items()}
    beside = _try(metric.measure, looks["reference"], reference) if metric.measure.one_sided else None
    doubled, about = _doubled(generated, reference), [extractor.warning] if extractor.warning else []
    about += _about_interval(metric.measure, found, interval, generated)
    by_chance = {} if found.chance is None else {"chance": found.chance}
    record = Record(
        metric.name,
        found.value,
        interval,
        n_generated=found.count,
        n_reference=len(reference.clips) if not metric.measure.one_sided else beside.count if beside else 0,
        floor=_floor(metric.measure, reference, most=len(generated.clips)),
        ceilings=by_chance | _ceilings(metric.measure, looks, most=len(generated.clips)),
        valid=found.valid and not (doubled and isinstance(metric.measure, Distance | Score)),
        warnings=tuple([*doubled, *about, *_warnings(metric.measure, found, generated, reference)]),
        weights_sha256=extractor.sha256,
    )
    return Judged(make_record(record, protocol), found.values, beside.values if beside else None)


def with_notes(judged: Judged, notes: Sequence[str]) -> Judged:
    """With what is to be said of every metric, first: the clips that were left out."""
    told = list(notes[:MOST_NAMED])
    if len(notes) > MOST_NAMED:
        told.append(f"{len(notes) - MOST_NAMED} more clips were left out")
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
    """What the reference makes of itself: the distance of a part as large as the generated side, or of half, from all
    the rest; or how far apart the values of two such parts are."""
    if not measure.one_sided:
        found = _try(measure, *_split(reference, at=_size(reference, most)))
        return None if found is None else found.value
    one, other = halves(reference, most=most)
    there, back = _try(measure, one, other), _try(measure, other, one)
    return None if there is None or back is None else abs(there.value - back.value)


def _ceilings(measure: Measure, looks: Mapping[str, Side], *, most: int) -> dict[str, float]:
    """The values of the reference and of the altered reference; of a distance, those of the floor with its first part
    altered: from the same clips as they were it would be less than from others."""
    reference = looks["reference"]
    if not measure.one_sided:
        size = _size(reference, most)
        looks = {name: _split(side, at=size)[0] for name, side in looks.items() if name != "reference"}
        reference = _split(reference, at=size)[1]
    found = {name: _try(measure, side, reference) for name, side in looks.items()}
    return {name: one.value for name, one in found.items() if one is not None}


def _size(reference: Side, most: int) -> int:
    """How many reference clips stand for the generated ones against the others."""
    return min(most, len(reference.clips) // 2)


def _split(side: Side, *, at: int) -> tuple[Side, Side]:
    """So many clips, and the rest: by the hash of the ids, as `halves`."""
    order = sorted(range(len(side.clips)), key=lambda i: digest(side.clips[i].id))
    return side.part(sorted(order[:at])), side.part(sorted(order[at:]))


def _doubled(generated: Side, reference: Side) -> list[str]:
    """Which of the clips feign a larger set, or a better one: a distance of sets means nothing with these in it."""
    ours, theirs = [clip.sha256 for clip in generated.clips], {clip.sha256 for clip in reference.clips}
    told = []
    if copies := sum(sha256 in theirs for sha256 in ours):
        told.append(f"{copies} of {len(ours)} generated clips are files of the reference, byte for byte")
    if twins := len(ours) - len(set(ours)):
        told.append(f"{twins} of {len(ours)} generated clips have the same bytes as another of them")
    return told


def _about_interval(measure: Measure, found: Found, interval: tuple[float, float] | None, generated: Side) -> list[str]:
    """That a bootstrap over prompts had few of them, or one."""
    if not isinstance(measure, PerClip) or found.values is None:
        return []
    prompts = len({clip.prompt for clip, value in zip(generated.clips, found.values, strict=True) if value == value})
    if interval is None:
        return ["there is no interval, for clips of one prompt say nothing of others"]
    if prompts >= FEW_PROMPTS or (measure.share and prompts == found.count):
        return []
    return [f"the interval is too narrow, being of {prompts} prompts only"]


def _warnings(measure: Measure, found: Found, generated: Side, reference: Side) -> list[str]:
    told = []
    shifts = isinstance(measure, Distance) and measure.shifts
    if not found.valid and isinstance(measure, Distance):
        if measure.trusted < generated.rows[:, slice(*measure.columns)].shape[1]:
            told.append(f"there are fewer than {measure.trusted} clips on a side, so the value is not valid")
        else:
            told.append("there are fewer clips than features, so the value is not valid; look at the kernel distance")
    elif shifts and len(generated.clips) != len(reference.clips):
        counts = f"{len(generated.clips)} generated and {len(reference.clips)} reference clips"
        told.append(f"{counts}: compare only with values of the same numbers")
    if shifts:
        size = _size(reference, len(generated.clips))
        fewer = ", fewer than the value is of, so they are too high" if size < len(generated.clips) else ""
        told.append(f"floor and ceilings are of {size} against {len(reference.clips) - size} reference clips{fewer}")
    if isinstance(measure, Score):
        told += _about_score(measure, generated, reference)
    return told


def _about_score(measure: Score, generated: Side, reference: Side) -> list[str]:
    classes, told = generated.rows[:, slice(*measure.columns)].shape[1], []
    ours, theirs = len(generated.clips), len(reference.clips)
    if ours < CLIPS_A_CLASS * classes:
        told.append(f"{ours} clips are few for {classes} classes: the score is too low, as is any of so few")
    if theirs < ours:
        told.append(f"the reference's own score is of {theirs} clips only, and so lower than of {ours}")
    return told
