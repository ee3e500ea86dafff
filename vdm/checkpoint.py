"""A checkpoint is a folder that is there in full or not at all.

Everything is written into a hidden sibling folder, the manifest (sizes and hashes of the other files) last; then one
rename makes it the checkpoint. A folder without a valid manifest is never loaded, and never the newest.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdm import __version__
from vdm.errors import CannotWrite, UserError
from vdm.weights import SUFFIX, Weights, open_weights, sha256, write_pickle, write_safetensors

FORMAT_VERSION = 1
CONFIG, MANIFEST, TRAINER = "config.yaml", "manifest.json", "trainer.pt"
ADAPTER = "adapter_config.json"  # PEFT's, in the checkpoints of a LoRA


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size and the SHA-256 of its bytes."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds. `info` is what the writer had to say, such as the step."""

    format_version: int
    vdm_version: str
    info: Mapping[str, Any]
    files: Mapping[str, FileRecord]

    @property
    def parts(self) -> list[str]:
        """Names of the sets of weights, such as "unet" and "unet.ema"."""
        return [name.removesuffix(SUFFIX) for name in self.files if name.endswith(SUFFIX)]


def save_checkpoint(
    path: str | Path,
    *,
    config_yaml: str,
    weights: Mapping[str, Mapping[str, Tensor]],
    trainer_state: Mapping[str, Any] | None = None,
    info: Mapping[str, Any],
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write the folder `path` in one step; one that is there is replaced once the new one is complete.

    `weights` maps a part's name, such as "unet.ema", to its state dict, which may be read as it is written;
    `trainer_state` holds tensors and plain values; `info` holds JSON values; `notes` are further text files. Raises
    CannotWrite if the disk refuses, and then leaves what was there before.
    """
    with written_whole(path, replaces="checkpoint", may_replace=_holds_only_ours) as folder:
        for part, tensors in weights.items():
            write_safetensors(folder / f"{part}{SUFFIX}", tensors)
        if trainer_state is not None:
            write_pickle(folder / TRAINER, trainer_state)
        for name, text in {**(notes or {}), CONFIG: config_yaml}.items():
            (folder / name).write_text(text, encoding="utf-8")
        files = {file.name: _record(file) for file in sorted(folder.iterdir())}
        manifest = Manifest(FORMAT_VERSION, __version__, dict(info), files)
        (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")


@contextmanager
def written_whole(path: str | Path, *, replaces: str, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """A hidden folder to write into, which becomes `path` when the block ends well and vanishes when it does not.

    Raises UserError where the disk refuses, or where `path` is there and is no `replaces` that `may_replace`.
    """
    path = Path(path).resolve()
    folder = _beside(path, "tmp")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        if path.exists() and not may_replace(path):
            raise UserError(f"{path} exists and is not a {replaces}; choose another folder or remove it")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        for written in (*folder.rglob("*"), folder):
            _sync(written)
        _put_in_place(folder, path)
    except OSError as error:
        remedy = "free space there or choose another folder"
        raise CannotWrite(f"{replaces} {path} cannot be written: {error}; {remedy}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # of folders that were made for it none is left empty
            for parent in made:
                parent.rmdir()


def _holds_only_ours(path: Path) -> bool:
    """Whether replacing `path` could destroy nothing but a checkpoint, be it half-written."""
    ours = (CONFIG, MANIFEST, TRAINER, ADAPTER)
    return path.is_dir() and all(file.name in ours or SUFFIX in file.name for file in path.iterdir())


def _beside(path: Path, purpose: str) -> Path:
    return path.with_name(f".{path.name}.{purpose}-{os.getpid()}")


def _put_in_place(folder: Path, path: Path) -> None:
    """Rename `folder` to `path`; what is there gives way only once the new one stands."""
    aside = _beside(path, "old")
    replaces = path.exists()
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    try:
        folder.rename(path)
    except OSError:
        if replaces:
            aside.rename(path)
        raise
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _record(file: Path) -> FileRecord:
    return FileRecord(bytes=file.stat().st_size, sha256=sha256(file))


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a checkpoint, whose files are not looked at. Raises UserError as `verify` does."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"checkpoint {path} " + ("is not a folder" if path.exists() else "does not exist"))
    try:
        return _parse_manifest(json.loads((path / MANIFEST).read_text(encoding="utf-8")))
    except FileNotFoundError:
        problem = f"{path} has no {MANIFEST}: it is no checkpoint, or was not written to its end"
        raise UserError(f"{problem}; choose another folder") from None
    except OSError as error:
        raise UserError(f"{path / MANIFEST} cannot be read: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"checkpoint {path} {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path / MANIFEST} is damaged; copy the checkpoint again or choose another") from None


def _parse_manifest(tree: Any) -> Manifest:
    if tree["format_version"] > FORMAT_VERSION:
        raise UserError(f"was written by vdm {tree['vdm_version']}, which is newer than this one; update vdm")
    files = {str(name): FileRecord(**record) for name, record in tree["files"].items()}
    if any(Path(name).name != name for name in files):
        raise ValueError("a file outside the folder")
    return Manifest(tree["format_version"], tree["vdm_version"], tree["info"], files)


def verify(path: str | Path) -> Manifest:
    """Check every file of a checkpoint against its manifest, and return that. Raises UserError saying what is amiss."""
    manifest = read_manifest(path)
    for name in manifest.files:
        _checked(Path(path), manifest, name)
    return manifest


def checked_file(path: str | Path, name: str) -> Path:
    """The path of one file of a checkpoint, after a check of it. Raises UserError."""
    manifest = read_manifest(path)
    if name not in manifest.files:
        raise UserError(f"checkpoint {path} has no {name} in its manifest; copy the checkpoint again or choose another")
    return _checked(Path(path), manifest, name)


def _checked(path: Path, manifest: Manifest, name: str) -> Path:
    """The path of one file of a checkpoint, once it is known to be what the manifest says."""
    file, expected = path / name, manifest.files[name]
    remedy = "copy the checkpoint again or choose another"
    try:
        size = file.stat().st_size
        if size != expected.bytes:
            raise UserError(f"{file} has {size} bytes instead of {expected.bytes}; {remedy}")
        if _record(file) != expected:
            raise UserError(f"{file} is damaged, for its SHA-256 differs from the manifest's; {remedy}")
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {remedy}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; {remedy}") from error
    return file


def load_weights(path: str | Path, part: str) -> Weights:
    """The state dict of one part, after a check of its file. Raises UserError."""
    manifest = read_manifest(path)
    if part not in manifest.parts:
        there = ", ".join(manifest.parts) or "nothing"
        raise UserError(f"checkpoint {path} holds no weights of {part}, only of {there}")
    return open_weights(_checked(Path(path), manifest, f"{part}{SUFFIX}"))


def load_trainer_state(path: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as trainer_state, on the CPU, after a check of its file. Raises UserError."""
    manifest = read_manifest(path)
    if TRAINER not in manifest.files:
        raise UserError(f"checkpoint {path} holds no trainer state, so no run can resume from it; use it as init_from")
    state: dict[str, Any] = torch.load(_checked(Path(path), manifest, TRAINER), map_location="cpu", weights_only=True)
    return state


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """The folders checkpoint-<step> of a run, by step, whether valid or not."""
    found = [path for path in Path(run_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step of a folder checkpoint-<step>."""
    return int(path.name.removeprefix("checkpoint-"))


def seems_complete(path: Path) -> bool:
    """Whether there is, or may be where one is not let look, the manifest of a checkpoint."""
    try:
        return (path / MANIFEST).is_file()
    except OSError:
        return True


def _info(path: Path) -> Mapping[str, Any]:
    """What a checkpoint's writer had to say; nothing where its manifest is damaged."""
    try:
        return read_manifest(path).info
    except UserError:
        return {}


def latest(run_dir: str | Path) -> Path | None:
    """The valid checkpoint with the highest step, or None; an invalid one is named on stderr and passed over."""
    for path in reversed(list_checkpoints(run_dir)):
        try:
            verify(path)
            return path
        except UserError as error:
            print(f"warning: passing over {path.name}: {error}", file=sys.stderr)
    return None


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay: the newest `newest` (None: all), those of every `every`-th step, and the one
    with the lowest `best` in its info (a name such as "val_loss"; of equals the newest)."""

    newest: int | None = None
    every: int | None = None
    best: str | None = None

    def keeps(self, steps: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """The steps that stay of some checkpoints, given by step with their info."""
        if self.newest is None:
            return set(steps)
        kept = set(sorted(steps)[-self.newest :])
        kept |= {step for step in steps if self.every is not None and step % self.every == 0}
        scores = {step: info.get(self.best, math.inf) for step, info in steps.items() if self.best is not None}
        scores = {step: score for step, score in scores.items() if math.isfinite(score)}
        return kept | ({min(scores, key=lambda step: (scores[step], -step))} if scores else set())


def prune(run_dir: str | Path, *, retention: Retention, until: int) -> None:
    """Delete the complete checkpoints of a run that do not stay, of those up to step `until`.

    `until` is that of the one just written: later ones are damaged, for the run did not go on from them, and must not
    take its place. For the holder of the RunLock.
    """
    complete = {step_of(p): p for p in list_checkpoints(run_dir) if seems_complete(p) and step_of(p) <= until}
    kept = retention.keeps({step: _info(path) for step, path in complete.items()})
    for path in (path for step, path in complete.items() if step not in kept):
        doomed = _beside(path, "tmp")
        path.rename(doomed)  # at once no checkpoint any more, even if the deletion is cut short
        shutil.rmtree(doomed, ignore_errors=True)


class RunLock:
    """Sole use of a run folder, from construction until `release` or the end of the process, however it ends.

    Clears away what a killed process left half-written there. Raises UserError if another process holds the lock.
    """

    def __init__(self, run_dir: str | Path, *, what: str = "run folder", remedy: str = "choose another run_dir"):
        self.run_dir = Path(run_dir)
        self._handle: int | None = None
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise UserError(f"{what} {run_dir} is in use by another process; wait for it to end or {remedy}") from None
        except OSError as error:
            self._close()
            raise UserError(f"{what} {run_dir} cannot be written: {error.strerror}; {remedy}") from error
        # A data worker is a fork that may outlive a killed trainer, and must not keep its lock.
        os.register_at_fork(after_in_child=self._close)
        self._clear_leftovers()

    def _clear_leftovers(self) -> None:
        for path in self.run_dir.iterdir():
            match = re.fullmatch(r"\.(.+)\.(tmp|old)-\d+", path.name)
            if re.fullmatch(r"\..+\.\d+\.tmp", path.name) and path.is_file():  # of `files.replacing`
                path.unlink(missing_ok=True)
            if match and match[2] == "old" and not (self.run_dir / match[1]).exists():
                path.rename(self.run_dir / match[1])  # killed between the two renames: the old one is the checkpoint
            elif match:
                shutil.rmtree(path, ignore_errors=True)

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def release(self) -> None:
        """Let others use the folder."""
        if self._handle is not None:
            fcntl.flock(self._handle, fcntl.LOCK_UN)
        self._close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
