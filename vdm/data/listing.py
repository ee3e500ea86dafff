"""One's own clips by a list: a jsonl or csv file that names each clip's file and caption."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from vdm.data.captions import filled
from vdm.data.ssv2 import ClipFile, NoSuchSplit, Split, validation_ids
from vdm.errors import UserError
from vdm.files import at_home, is_file

Kind = Literal["jsonl", "csv"]
FILE, CAPTION = ("file", "file_name", "path", "video"), ("caption", "text")  # as lists of several makers call them


def find_listed(root: str | Path, split: Split, *, kind: Kind) -> list[ClipFile]:
    """The clips of one split, as listed; `problem` marks those without a file or a caption.

    `root` is the list, or a folder with `metadata.jsonl` or `metadata.csv`. Each line has `file`, relative to the list,
    and `caption`, or these by another name in FILE and CAPTION; a jsonl line may have SSv2's `template` and
    `placeholders` too. Validation is the tenth of the files with the smallest hash, at least one. Raises UserError for
    a list that cannot be read, and for an empty split.
    """
    path = at_home(root)
    path = path / f"metadata.{kind}" if path.is_dir() else path
    entries = list(_entries(path, kind))
    names = [str(entry["file"]) for entry in entries]
    held_out = validation_ids(names)
    wanted = [
        _clip(path, entry) for name, entry in zip(names, entries, strict=True)
        if (name in held_out) == (split == "validation")
    ]  # fmt: skip
    if split == "test" or not wanted:
        raise NoSuchSplit(f"the {split} split of {path} is empty: of {len(entries)} clips none is left for it")
    return wanted


def _entries(path: Path, kind: Kind) -> Iterator[Mapping[str, object]]:
    """Every line of a list, each with a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"data list {path} does not exist; set data.root to it, or to the folder that it is in"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data list {path} cannot be read ({error}); it must be UTF-8 text") from error
    for number, entry in _parsed(text, path, kind):
        file = _first(entry, FILE) if isinstance(entry, Mapping) else None
        if not isinstance(entry, Mapping) or not isinstance(file, str) or not file:
            raise UserError(f"line {number} of {path} names no file; each line needs file and caption")
        yield {**entry, "file": file, "caption": _first(entry, CAPTION)}


def _first(entry: Mapping[str, object], names: Sequence[str]) -> object:
    return next((entry[name] for name in names if name in entry), None)


def _parsed(text: str, path: Path, kind: Kind) -> Iterator[tuple[int, object]]:
    if kind == "csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            if not all({*names} & {*(reader.fieldnames or names)} for names in (FILE, CAPTION)):
                raise UserError(f"the first line of {path} names no columns file and caption; begin it: file,caption")
            for entry in reader:
                yield reader.line_num, entry
        except csv.Error as error:
            where = f"what follows line {reader.line_num} of {path}"
            raise UserError(f"{where} is not valid CSV: {error}; mend or remove it") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold what else ends a line
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number} of {path} is not valid JSON: {error}; mend or remove it") from error


def _clip(path: Path, entry: Mapping[str, object]) -> ClipFile:
    name = str(entry["file"])
    file, caption = path.parent / name, entry.get("caption")
    text = caption.strip() if isinstance(caption, str) else ""
    problem = "no file" if not is_file(file) else "" if text else "it has no caption"
    return ClipFile(str(Path(name).with_suffix("")), file, text, problem, *filled(entry))
