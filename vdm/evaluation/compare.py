"""`vdm evaluate --compare`: runs beside each other, clip by clip where they have the same prompts and seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vdm.errors import UserError
from vdm.evaluation.compare_page import Row, Run, write_compare_page
from vdm.evaluation.per_clip import Line, read_per_clip
from vdm.evaluation.records import Record, interval, number, read_records, require_comparable
from vdm.files import replacing
from vdm.metrics.intervals import Z95, paired_difference

FILE = "compare.json"
SEED = 0
Pairs = dict[tuple[str, int], float]


@dataclass(frozen=True)
class Difference:
    """How much higher a metric is in one run than in the first; `ci95` None where none can be had.

    `how` is "paired" where single clips have values, and pairs of one prompt and seed were compared; "unpaired" where
    whole sets were, and the two intervals are put together as if the runs had nothing in common.
    """

    metric: str
    first: str
    other: str
    value_first: float
    value_other: float
    difference: float
    ci95: tuple[float, float] | None
    how: str
    num_pairs: int | None
    note: str = ""

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.ci95 is not None and not self.ci95[0] <= 0 <= self.ci95[1]

    @property
    def clips(self) -> str:
        return "unpaired" if self.num_pairs is None else f"{self.num_pairs} pairs"


def compare(folders: Sequence[Path], output_dir: Path) -> list[Difference]:
    """Every run against the first, by each metric that all have a value of; written to `compare.json`, and with curves
    over the runs to `compare.html`.

    Raises UserError where a folder is not that of an evaluation, where a metric was not measured alike in all, and
    where they have no metric in common.
    """
    if len(folders) < 2 or len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("--compare needs two different folders or more, each the --output_dir of a vdm evaluate")
    records = [read_records(folder) for folder in folders]
    lines = [_lines_of(folder, one) for folder, one in zip(folders, records, strict=True)]
    common = [name for name in records[0] if all(name in one and one[name].ok for one in records)]
    if not common:
        raise UserError(f"{folders[0]} and {folders[1]} have no metric in common that has a value; evaluate them alike")
    found = []
    for name in common:
        require_comparable([one[name] for one in records])
        for i in range(1, len(folders)):
            both = records[0][name], records[i][name]
            names = str(folders[0]), str(folders[i])
            found.append(_difference(both, names, (_values(lines[0], name), _values(lines[i], name))))
    runs = [Run(str(folder), one) for folder, one in zip(folders, records, strict=True)]
    rows = [Row(one.metric, one.other, one.difference, one.ci95, one.clips, one.note, one.sure) for one in found]
    write_compare_page(output_dir, runs, common, rows)
    with replacing(output_dir / FILE, remedy="choose another --output_dir") as file:
        file.write_text(json.dumps([asdict(one) for one in found], indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return found


def _lines_of(folder: Path, records: Mapping[str, Record]) -> list[Line]:
    """Raises UserError where they are not those that were written with the records."""
    lines, sha256 = read_per_clip(folder)
    if any(record.protocol.get("per_clip_sha256") != sha256 for record in records.values()):
        raise UserError(f"metrics.json and per_clip.jsonl in {folder} are not of one evaluation; evaluate anew")
    return lines


def _values(lines: Sequence[Line], metric: str) -> Pairs:
    return {
        (line.prompt, line.seed or 0): line.values[metric]
        for line in lines
        if line.side == "generated" and metric in line.values
    }


def _difference(both: tuple[Record, Record], names: tuple[str, str], values: tuple[Pairs, Pairs]) -> Difference:
    first, other = both
    assert first.value is not None and other.value is not None, "both are ok"
    told = first.metric, *names, first.value, other.value
    if not values[0] or not values[1]:
        note = "" if first.n_generated == other.n_generated else "not of the same number of clips, which shifts it"
        return Difference(*told, other.value - first.value, _unpaired(first, other), "unpaired", None, note)
    try:
        found = paired_difference(values[1], values[0], seed=SEED)
    except UserError as error:
        return Difference(*told, other.value - first.value, None, "unpaired", 0, str(error))
    note = f"{found.num_unpaired} clips have no partner" if found.num_unpaired else ""
    return Difference(*told, found.mean, (found.low, found.high), "paired", found.num_pairs, note)


def _unpaired(first: Record, other: Record) -> tuple[float, float] | None:
    if first.ci95 is None or other.ci95 is None or first.value is None or other.value is None:
        return None
    errors = [(one.ci95[1] - one.ci95[0]) / (2 * Z95) for one in (first, other) if one.ci95]
    half = Z95 * sum(error**2 for error in errors) ** 0.5
    return other.value - first.value - half, other.value - first.value + half


def table(found: Sequence[Difference]) -> str:
    """The differences in Markdown; a star where the interval leaves out 0."""
    head = ["metric", "run", "first", "this", "difference", "95 %", "clips", ""]
    rows = [
        [
            one.metric, one.other, number(one.value_first), number(one.value_other),
            f"{one.difference:+.4g}" + ("*" if one.sure else ""), interval(one.ci95), one.clips, one.note,
        ]
        for one in found
    ]  # fmt: skip
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
    return "\n".join([f"first: {found[0].first}; *: the interval leaves out 0", "", *lines]) + "\n"
