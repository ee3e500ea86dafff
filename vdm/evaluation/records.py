"""What is written of a metric: its value and all that one must know to compare it, with a hash that tells when one may.

The value of one model means nothing beside that of another that was measured otherwise: with other frame rates, other
reference clips, other weights. So every record carries how it came about, and records that differ in that are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vdm.errors import UserError
from vdm.evaluation.checked import WRONG, built
from vdm.files import replacing

FILE = "metrics.json"
OK = "ok"
# Every protocol has these, null where a metric does not know the word.
PROTOCOL_KEYS = (
    "n_real", "n_gen", "T", "fps", "stride", "height", "width", "resize", "interp", "codec", "layer", "weights_sha256",
    "bn_eps", "cov", "dtype", "seed", "ids_sha256", "code_version", "checkpoint", "valid", "warnings",
    "per_clip_sha256",
)  # fmt: skip
# What was measured and what came out, rather than how: no part of the hash.
OUTCOMES = frozenset(("n_real", "n_gen", "checkpoint", "valid", "warnings", "per_clip_sha256"))

Protocol = Mapping[str, object]


@dataclass(frozen=True)
class Record:
    """One metric of one set of clips.

    `ci95` is the 95 % interval of the value at this number of clips, None where there is none: what a distance gains
    by there being few is in the value and not in the interval. `floor` is what one part of the reference makes of
    another: less cannot be told from nothing. `ceilings` are the values of the reference itself (where a metric needs
    no other side) and of the reference made worse. `status` is "ok", or begins with "skipped" and says what is
    missing; then there is no value.
    """

    metric: str
    value: float | None
    ci95: tuple[float, float] | None = None
    n_generated: int = 0
    n_reference: int = 0
    floor: float | None = None
    ceilings: Mapping[str, float] = field(default_factory=dict)
    valid: bool = False
    status: str = OK
    warnings: tuple[str, ...] = ()
    protocol: Protocol = field(default_factory=dict)
    protocol_hash: str = ""
    weights_sha256: str | None = None

    @property
    def ok(self) -> bool:
        return self.status == OK

    @property
    def off(self) -> float | None:
        """How far the value is from the reference's own, which says more of what describes than that it is high."""
        beside = self.ceilings.get("reference")
        return None if beside is None or self.value is None else abs(self.value - beside)


def make_record(record: Record, protocol: Protocol) -> Record:
    """A record with its protocol complete, and the hash of that."""
    outcome = {
        "n_real": record.n_reference,
        "n_gen": record.n_generated,
        "valid": record.valid,
        "warnings": list(record.warnings),
        "weights_sha256": record.weights_sha256,
    }
    whole = {**dict.fromkeys(PROTOCOL_KEYS), "metric": record.metric, **protocol, **outcome}
    return Record(**{**vars(record), "protocol": whole, "protocol_hash": protocol_hash(whole)})


def with_lines(records: Sequence[Record], sha256: str) -> list[Record]:
    """Records that say which per_clip.jsonl was written with them, for the two are written one after the other."""
    return [make_record(record, {**record.protocol, "per_clip_sha256": sha256}) for record in records]


def protocol_hash(protocol: Protocol) -> str:
    """The sha256, in hex, of a protocol in canonical JSON, without counts and what else came out (OUTCOMES)."""
    return digest({key: value for key, value in protocol.items() if key not in OUTCOMES})


def digest(content: object) -> str:
    """The sha256, in hex, of content in canonical JSON: keys in order, no spaces, ASCII, no NaN."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def require_comparable(records: Sequence[Record]) -> None:
    """Raises UserError where records of one metric were not measured alike; the sentence names what differs."""
    first = records[0]
    for other in records[1:]:
        if other.protocol_hash != first.protocol_hash:
            keys = sorted({*first.protocol, *other.protocol} - OUTCOMES)
            changed = [key for key in keys if first.protocol.get(key) != other.protocol.get(key)]
            told = "; ".join(f"{key} {first.protocol.get(key)} and {other.protocol.get(key)}" for key in changed)
            raise UserError(
                f"{first.metric} was not measured alike, so its values cannot be compared: {told or 'other hashes'}; "
                "evaluate both with the same reference, weights and version"
            )


def write_records(folder: Path, records: Sequence[Record]) -> None:
    """Write `metrics.json`, which appears whole or not at all."""
    with replacing(folder / FILE, remedy="choose another --output_dir") as file:
        content = [asdict(record) for record in records]
        file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_records(folder: Path) -> dict[str, Record]:
    """The records of a folder by metric. Raises UserError where it holds none, or their hashes are not theirs."""
    path = folder / FILE
    records: dict[str, Record] = {}
    try:
        for entry in list(json.loads(path.read_text(encoding="utf-8"))):
            record = built(Record, entry)
            _require_sound(record)
            if record.metric in records:
                raise ValueError(f"{record.metric} is there twice")
            records[record.metric] = record
        others = [name for name, one in records.items() if one.protocol_hash != protocol_hash(one.protocol)]
    except OSError as error:
        raise UserError(
            f"{folder} holds no {FILE} that can be read; give the --output_dir of a vdm evaluate"
        ) from error
    except WRONG as error:
        raise UserError(f"{path} is not what vdm evaluate writes ({error}); evaluate anew") from error
    if others:
        raise UserError(f"the hash of {others[0]} in {path} is not that of its protocol; evaluate anew")
    return records


def _require_sound(record: Record) -> None:
    """Raises ValueError where a value is there and should not be, or the other way round, or its interval is none."""
    if record.ok != (record.value is not None):
        raise ValueError(f"{record.metric} has value {number(record.value)}, and status {record.status!r}")
    if record.ci95 is not None and record.ci95[0] > record.ci95[1]:
        raise ValueError(f"{record.metric} has an interval from {interval(record.ci95)}")


# ---- for the eye


def number(value: float | None) -> str:
    """Four significant digits; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"


def interval(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None else f"{pair[0]:.4g} to {pair[1]:.4g}"


def table(records: Sequence[Record]) -> str:
    """The records as a Markdown table, and below it what was skipped, and the warnings."""
    ok = [record for record in records if record.ok]
    names = list(dict.fromkeys(name for record in ok for name in record.ceilings))
    head = ["metric", "value", "95 %", "off the reference", "floor", *names, "clips", "reference clips", "valid"]
    rows = [
        [
            record.metric, number(record.value), interval(record.ci95), number(record.off), number(record.floor),
            *(number(record.ceilings.get(name)) for name in names),
            str(record.n_generated), str(record.n_reference), "yes" if record.valid else "no",
        ]
        for record in ok
    ]  # fmt: skip
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)] if ok else []
    notes = [f"- {names}: {sentence}" for names, sentence in notes_of(records)]
    return "\n".join([*lines, "", *notes] if notes else lines) + "\n"


def notes_of(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Why some were skipped, and the warnings: each sentence once, with the names of all metrics that it is told of."""
    ok = [record for record in records if record.ok]
    told = _grouped([(record.status, record.metric) for record in records if not record.ok])
    return told + _grouped([(text, record.metric) for record in ok for text in record.warnings], num_all=len(ok))


def _grouped(told: Sequence[tuple[str, str]], *, num_all: int = 0) -> list[tuple[str, str]]:
    groups: dict[str, list[str]] = {}
    for sentence, metric in told:
        groups.setdefault(sentence, []).append(metric)
    return [
        ("all" if 1 < num_all == len(metrics) else ", ".join(metrics), sentence) for sentence, metrics in groups.items()
    ]
