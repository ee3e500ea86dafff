"""Rows that were extracted before, so that what has not changed is not decoded and not extracted again.

A row is kept under the sha256 of all that it depends on: the bytes of the clip's file, how it was read and altered, its
prompt. Each extractor has a folder named after its protocol, weights and code; each process writes a file of its own
there and reads all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vdm.files import replacing

Row = npt.NDArray[np.floating]


def load_rows(folder: Path) -> dict[str, Row]:
    """All rows of an extractor's folder, by key; none where there is none. A damaged file is as good as none."""
    found: dict[str, Row] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            content = load_file(file)
            keys, rows = content["keys"], content["rows"]
        except (SafetensorError, OSError, KeyError):
            continue
        found |= {key.tobytes().hex(): row for key, row in zip(keys, rows, strict=True)}
    return found


def save_rows(folder: Path, rows: Mapping[str, Row], *, name: str) -> None:
    """Write rows (D,) by their keys, sha256 in hex, as NAME.safetensors, which appears whole or not at all."""
    if not rows:
        return
    keys = np.frombuffer(bytes.fromhex("".join(rows)), dtype=np.uint8).reshape(len(rows), 32)
    with replacing(folder / f"{name}.safetensors", remedy="choose another --output_dir") as file:
        save_file({"keys": keys, "rows": np.stack(list(rows.values()))}, file)


@lru_cache(maxsize=1)
def source_sha256() -> str:
    """Of all of vdm's own code: what was extracted by other code is extracted anew, rather than trusted."""
    hashed = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        hashed.update(file.read_bytes())
    return hashed.hexdigest()
