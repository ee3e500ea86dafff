"""Rows that were extracted before, so that what has not changed is not decoded and not extracted again.

A row is kept under the sha256 of all that it depends on: the bytes of the clip's file, how it was read and altered, its
prompt. Each extractor has a folder named after its protocol, weights and code; each process writes a file of its own
there and reads all. A file carries the sha256 of its content, and one that has another is as good as none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt
import open_clip
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vdm import dist
from vdm.files import replacing

Row = npt.NDArray[np.floating]


def load_rows(folder: Path) -> dict[str, Row]:
    """All rows of an extractor's folder, by key; none where there is none."""
    found: dict[str, Row] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as content:
                keys, rows = content.get_tensor("keys"), content.get_tensor("rows")
                told = (content.metadata() or {}).get("sha256")
        except (SafetensorError, OSError):
            continue
        if told != _sha256(keys, rows):
            continue
        found |= {key.tobytes().hex(): row for key, row in zip(keys, rows, strict=True)}
    return found


def save_rows(folder: Path, rows: Mapping[str, Row], *, name: str) -> None:
    """Write rows (D,) by their keys, sha256 in hex, as NAME.safetensors, which appears whole or not at all."""
    if not rows:
        return
    keys = np.frombuffer(bytes.fromhex("".join(rows)), dtype=np.uint8).reshape(len(rows), 32)
    stacked = np.stack(list(rows.values()))
    with replacing(folder / f"{name}.safetensors", remedy="choose another --output_dir") as file:
        save_file({"keys": keys, "rows": stacked}, file, metadata={"sha256": _sha256(keys, stacked)})


def _sha256(keys: npt.NDArray[np.uint8], rows: Row) -> str:
    shapes = f"{keys.dtype} {keys.shape} {rows.dtype} {rows.shape}"
    return hashlib.sha256(shapes.encode() + keys.tobytes() + rows.tobytes()).hexdigest()


def machinery() -> dict[str, str]:
    """What decodes and computes besides vdm's own code: the last digits are its doing."""
    device = dist.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    libraries = (av, cv2, np, open_clip, torch)
    return {"device": name, **{library.__name__: str(library.__version__) for library in libraries}}


@lru_cache(maxsize=1)
def source_sha256() -> str:
    """Of all of vdm's own code: what was extracted by other code is extracted anew, rather than trusted."""
    hashed = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        hashed.update(file.read_bytes())
    return hashed.hexdigest()
