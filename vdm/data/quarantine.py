"""Clips that cannot be used: counted, named once, written down; a run with too many of them is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol

from vdm.data.settings import DataConfig
from vdm.errors import UserError

Bad = list[tuple[str, str]]  # (clip id, why it cannot be used)


class DataSet(Protocol):
    """What of a data set is counted."""

    config: DataConfig
    split: Literal["train", "validation"]
    num_listed: int
    missing: Bad


class BadClips:
    """Counts the clips of a data set that cannot be used, and names each once, on stderr and in the file `record`.

    That is one JSON object a line: id, split and reason. It is added to, and what it names already is not named again.
    """

    def __init__(self, dataset: DataSet, record: Path | None = None) -> None:
        self.num_clips = dataset.num_listed
        self.limit = dataset.config.max_bad_share
        self.split = dataset.split
        self.record = record
        self.reasons: dict[str, str] = {}
        self._named = _named_in(record, self.split)
        self.note(dataset.missing)

    def note(self, bad: Iterable[tuple[str, str]]) -> None:
        """Warn of those not named before; raises UserError when more than `data.max_bad_share` of the clips are bad."""
        for name, reason in bad:
            if name not in self.reasons:
                self.reasons[name] = reason
                print(f"warning: clip {name} is left out: {reason}", file=sys.stderr)
                if self.record is not None and name not in self._named:
                    with suppress(OSError), self.record.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"id": name, "split": self.split, "reason": reason}) + "\n")
        refuse_bad_share(list(self.reasons.items()), num_clips=self.num_clips, limit=self.limit)


def _named_in(record: Path | None, split: str) -> frozenset[str]:
    """The clips of a split that a record names; a line cut short by a crash names none."""
    if record is None or not record.is_file():
        return frozenset()
    names = set()
    for line in record.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if entry["split"] == split:
                names.add(entry["id"])
    return frozenset(names)


def refuse_bad_share(bad: Bad, *, num_clips: int, limit: float) -> None:
    """Raise UserError when `bad` is more than `limit` of `num_clips`."""
    if len(bad) > limit * num_clips:
        share = 100 * len(bad) / num_clips
        raise UserError(
            f"{len(bad)} of {num_clips} clips ({share:.0f} %) cannot be read ({first_of(bad)}); "
            f"limit data.max_bad_share={limit}: mend or remove them, or raise the limit"
        )


def first_of(bad: Bad) -> str:
    name, reason = bad[0]
    return f"first: {name}: {reason}"
