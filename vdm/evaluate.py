"""`vdm evaluate`: a sample folder and a reference to records, tables and one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vdm import __version__, dist
from vdm.errors import CannotWrite, UserError
from vdm.evaluation import classified, clips, judging, networks, verdicts
from vdm.evaluation.altered import ALTERATIONS, NOISE, SEED, as_it_is
from vdm.evaluation.catalogue import Metric, chosen
from vdm.evaluation.clips import Clip, Shape
from vdm.evaluation.extract import Extracted, Opened, Task, extract
from vdm.evaluation.extractors import THUMBNAIL, extractors
from vdm.evaluation.judging import Judged
from vdm.evaluation.options import USUAL, Options
from vdm.evaluation.page import Confusion, Content, write_page
from vdm.evaluation.per_clip import Line, lines_of, write_per_clip
from vdm.evaluation.records import FILE as RECORDS
from vdm.evaluation.records import Record, digest, table, with_lines, write_records
from vdm.files import in_words, replacing

TABLE = "metrics.md"
REMEDY = "choose another --output_dir"


@dataclass(frozen=True)
class Request:
    """What to evaluate, by what; `metrics` None is all, `split` is train, validation or all of the reference."""

    generated: Path
    reference: Path
    output_dir: Path = Path("results/metrics")
    metrics: tuple[str, ...] | None = None
    weights_dir: Path = Path("weights")
    split: str = "all"
    options: Options = USUAL


@dataclass(frozen=True)
class Listed:
    """Both sides before a frame is decoded, and sentences on clips that are listed but cannot be had."""

    generated: Sequence[Clip]
    reference: Sequence[Clip]
    shape: Shape
    notes: Sequence[str]


def evaluate(request: Request) -> list[Record]:
    """Measure, and write metrics.json, metrics.md, per_clip.jsonl and report.html; returns the records.

    Where torchrun has started several processes they share the clips, and the main one writes what one alone would
    have; the others return nothing. Raises UserError before anything is decoded where folders or names are wrong, and
    where too few clips are good.
    """
    metrics = chosen(request.metrics, request.options)
    generated, shape = clips.generated_clips(request.generated)
    reference, notes = clips.reference_clips(request.reference, split=request.split)
    listed = Listed(generated, reference, shape, notes)
    _require_writable(request.output_dir)
    with dist.together():
        opened, missing = _opened(metrics, request.weights_dir, shape, request.options, useless=_useless(listed))
        try:
            ours, theirs = _extracted(listed, opened, request.output_dir / "cache")
        finally:
            networks.release()
        _require_clips(ours, theirs, shape)
    if not dist.is_main():  # what is left is for one, and may take longer than processes wait for each other
        return []
    base = _protocol(listed, theirs.clips, request.split)
    notes = [*notes, *(problem for side in (ours, theirs) for _, problem in side.problems)]
    found = [judging.with_notes(_judged(metric, opened, missing, ours, theirs, base=base), notes) for metric in metrics]
    return _write(request.output_dir, metrics, found, ours, theirs, shape)


def _require_writable(folder: Path) -> None:
    """What cannot be written is better said before than after."""
    if dist.is_main():
        probe = folder / ".probe"
        with replacing(probe, remedy=REMEDY) as file:
            file.touch()
        probe.unlink()


def _useless(listed: Listed) -> dict[str, str]:
    """Extractors that would tell nothing of any clip, and why."""
    if (classified.labels_of(listed.generated, listed.reference) >= 0).any():
        return {}
    return {"ssv2": "no prompt fills a template of Something-Something"}


def _opened(
    metrics: Sequence[Metric], weights_dir: Path, shape: Shape, options: Options, *, useless: Mapping[str, str]
) -> tuple[dict[str, Opened], dict[str, str]]:
    """The extractors that the metrics read, opened, and for the others what they lack."""
    there = extractors(options)
    opened, missing = {}, {}
    for name in dict.fromkeys([THUMBNAIL, *(metric.extractor for metric in metrics)]):
        extractor = there[name]
        if lack := extractor.missing(weights_dir, shape) or useless.get(name, ""):
            missing[name] = lack
        else:
            opened[name] = extractor.open(extractor.find(weights_dir), dist.device(), shape)
    return opened, missing


def _extracted(listed: Listed, opened: Mapping[str, Opened], cache: Path) -> tuple[Extracted, Extracted]:
    looks = {"": as_it_is, **ALTERATIONS}
    ours = Task("generated", listed.generated, clips.read_generated)
    theirs = Task("reference", listed.reference, clips.read_reference, looks)
    return (
        extract(ours, listed.shape, opened, cache=cache),
        extract(theirs, listed.shape, opened, cache=cache),
    )


def _require_clips(ours: Extracted, theirs: Extracted, shape: Shape) -> None:
    for side, least, name in ((ours, 1, "generated"), (theirs, 2, "reference")):
        if len(side.clips) < least:
            raise UserError(
                f"{len(side.clips)} of {len(side.clips) + len(side.problems)} {name} clips can be read as {shape}, "
                f"too few to evaluate ({side.problems[0][1]}); choose another folder"
            )


def _judged(
    metric: Metric,
    opened: Mapping[str, Opened],
    missing: Mapping[str, str],
    ours: Extracted,
    theirs: Extracted,
    *,
    base: Mapping[str, object],
) -> Judged:
    if metric.extractor in missing:
        return judging.skipped(metric, missing[metric.extractor], base)
    return judging.judged(metric, opened[metric.extractor], ours, theirs, base=base)


def _protocol(listed: Listed, reference: Sequence[Clip], split: str) -> dict[str, object]:
    """What all records have in common; `reference` is what could be read of it."""
    shape, checkpoints = listed.shape, {clip.checkpoint for clip in listed.generated}
    return {
        "T": shape.num_frames,
        "fps": float(shape.fps),  # a hash tells 8 from 8.0
        "stride": 1,
        "height": shape.height,
        "width": shape.width,
        "codec": f"generated {clips.suffixes(listed.generated)}, reference {clips.suffixes(listed.reference)}",
        "window": "generated: all frames; reference: the middle, at the fps, length and size of those generated",
        "split": f"{split}, the {clips.MOST_REFERENCE} clips with the smallest hashes at most",
        "alterations": f"frozen, shuffled, noise of {NOISE:g} grey levels",
        "seed": SEED,
        # Ids alone do not tell one reference from another: those of many data sets are numbers from 0 on.
        "ids_sha256": digest([[one.id, one.sha256, one.prompt, one.template, one.placeholders] for one in reference]),
        "code_version": __version__,
        "checkpoint": (checkpoints.pop() or None) if len(checkpoints) == 1 else None,
    }


def _write(
    folder: Path,
    metrics: Sequence[Metric],
    found: Sequence[Judged],
    ours: Extracted,
    theirs: Extracted,
    shape: Shape,
) -> list[Record]:
    """Whoever reads metrics.json finds the other files with it: an old one goes first, the new one comes last."""
    lines: list[Line] = [
        *lines_of("generated", {one.record.metric: one.generated for one in found}, ours, theirs),
        *lines_of("reference", {one.record.metric: one.reference for one in found}, theirs, theirs),
    ]
    _remove(folder / RECORDS)
    records = with_lines([one.record for one in found], write_per_clip(folder, lines))
    with replacing(folder / TABLE, remedy=REMEDY) as file:
        file.write_text(table(records), encoding="utf-8", errors="backslashreplace")
    write_page(folder, Content(records, metrics, lines, ours.clips, theirs.clips, shape, _confusions(ours, theirs)))
    write_records(folder, records)
    return records


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CannotWrite(f"cannot remove {path}: {in_words(error)}; {REMEDY}") from error


def _confusions(ours: Extracted, theirs: Extracted) -> list[Confusion]:
    """Of every judge of actions that was asked, where any prompt asks for one."""
    found = []
    if ("", "judge") in ours.rows:
        found.append(Confusion("Actions", *verdicts.confusion(ours.side("judge"))))
    if ("", "ssv2") in ours.rows:
        seen = classified.confusion(ours.side("ssv2"), theirs.side("ssv2"))
        found.append(Confusion("Actions of Something-Something, by VideoMAE", *seen))
    return [confusion for confusion in found if confusion.counts.any()]
