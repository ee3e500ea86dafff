"""A model as it lies on disk, in whichever layout: its config, and its parts under our names, not yet read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdm.config import Config, load, override, to_yaml
from vdm.errors import UserError
from vdm.interop.links import Report
from vdm.text.encoder import TOKEN_TABLE, VOCABULARY
from vdm.weights import Weights, open_weights, read_metadata, write_safetensors

PARTS = ("unet", "vae", "text")
NOTE, SEEN = "vdm.yaml", "vdm.safetensors"  # see `write_notes`


@dataclass(frozen=True)
class Part:
    """Weights under our names; the files they come from; what was done to them, where they are from another layout."""

    weights: Weights
    files: tuple[Path, ...]
    report: Report | None = None


@dataclass(frozen=True)
class StoredModel:
    """`parts` open a part when called. `remarks` are sentences on what the layout cannot say or we do not do alike."""

    layout: str
    path: Path
    config: Config
    parts: Mapping[str, Callable[[], Part]] = field(repr=False)
    remarks: tuple[str, ...] = ()

    def open(self, part: str) -> Part:
        """One part. Raises `UserError` where there is none, or it is not what the layout says."""
        if part not in self.parts:
            raise UserError(f"{self.path} holds no weights of {part}, only of {', '.join(self.parts) or 'nothing'}")
        return self.parts[part]()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError`."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; copy or download the folder again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy or download the folder again") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a JSON object; copy or download the folder again")
    return tree


@contextmanager
def making_sense_of(path: Path) -> Iterator[None]:
    """Turn what settings of another shape or type lead to into a `UserError` that names the file they are in."""
    try:
        yield
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path} makes no sense ({type(error).__name__}: {error}); copy or download it again"
        ) from error


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def need(tree: Mapping[str, Any], key: str, path: Path) -> Any:
    """tree[key]. Raises `UserError` naming the file."""
    if key not in tree:
        raise UserError(f"{path} does not say {key}; copy or download the folder again")
    return tree[key]


def refuse_unless(tree: Mapping[str, Any], only: Mapping[str, Any], path: Path) -> None:
    """Raises `UserError` where `tree` says anything but the one value that this model can have; silence is fine."""
    for key, value in only.items():
        if key in tree and tree[key] != value:
            said = f"{key} is {tree[key]!r}, and this model can only have {value!r}"
            raise UserError(f"{path}: {said}; give another folder")


def read_note(path: Path) -> Config | None:
    """Our own config from the note in a folder, if there is one."""
    try:
        return load(path / NOTE)
    except UserError:
        return None


def with_note(path: Path, derived: Config, described: Callable[[Config], object]) -> tuple[Config, tuple[str, ...]]:
    """Our config from the note, as long as it describes the model that the folder now holds; else `derived`.

    `derived` is what the folder says by itself, and `described` is what it would say of a config. Also a remark where
    there is a note that is not used.
    """
    note = read_note(path)
    try:
        if note is not None and described(note) == described(derived):
            return note, ()
    except UserError:
        pass  # it describes nothing that this layout could hold
    unused = f"{path / NOTE} does not describe what is now in this folder, so it is not used"
    return derived, (unused,) if (path / NOTE).exists() else ()


def config_of(path: Path, **sections: Any) -> Config:
    """A config of these sections, named after the folder; all else is as by default. Raises `UserError`."""
    name = path.resolve().name
    return override(Config(name=name if name not in ("", ".", "..") else "model", **sections))


def text_state(tower: Weights, folder: Path) -> Weights:
    """A text tower's tensors, named `tower.*`, with the record of the tokens that it knows.

    That is the one that we left in the folder, if it is of this very table of tokens; else all are known.
    """
    record = folder / SEEN
    seen = torch.ones(VOCABULARY, dtype=torch.bool)
    if record.is_file() and read_metadata(record).get("table") == _digest(tower[TOKEN_TABLE]):
        noted = open_weights(record)
        if "seen_tokens" in noted and (noted.specs["seen_tokens"].shape, noted.specs["seen_tokens"].dtype) == (
            seen.shape, seen.dtype
        ):  # fmt: skip
            seen = noted["seen_tokens"]
    return tower.updated({"seen_tokens": seen})


def write_notes(folder: Path, config: Config, text: Weights) -> None:
    """Beside the files of another layout, what it has no place for: our config, and the tokens that training saw."""
    (folder / NOTE).write_text(to_yaml(config), encoding="utf-8")
    metadata = {"table": _digest(text[TOKEN_TABLE])}
    write_safetensors(folder / SEEN, {"seen_tokens": text["seen_tokens"]}, metadata=metadata)


def _digest(table: Tensor) -> str:
    return hashlib.sha256(table.contiguous().view(torch.uint8).numpy().data).hexdigest()
