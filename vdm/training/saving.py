"""Writing checkpoints, if need be while training goes on; what is written is then a copy that no step changes."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vdm import dist
from vdm.checkpoint import save_checkpoint
from vdm.errors import CannotWrite


@dataclass(frozen=True)
class Contents:
    """What `save_checkpoint` writes; on other processes than the main one the tensors may be None."""

    config_yaml: str
    weights: Mapping[str, Mapping[str, Tensor]]
    trainer_state: Mapping[str, Any]
    info: Mapping[str, Any]
    notes: Mapping[str, str] = field(default_factory=dict)

    def copied(self) -> Contents:
        """The same with tensors that no step changes."""
        return replace(self, weights=copied(self.weights), trainer_state=copied(self.trainer_state))

    def write(self, path: Path) -> None:
        save_checkpoint(
            path,
            config_yaml=self.config_yaml,
            weights=self.weights,
            trainer_state=self.trainer_state,
            info=self.info,
            notes=self.notes,
        )


class Writer:
    """Writes one checkpoint at a time. All processes must make the same calls; the main one does the work."""

    def __init__(self, *, in_background: bool):
        self.in_background = in_background
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._path: Path | None = None
        self._job: Future[None] | None = None

    def start(self, path: Path, contents: Contents) -> None:
        """Begin to write, as `save_checkpoint` does; `written` says when it is done."""
        assert self._path is None, "one at a time"
        self._path = path
        if dist.is_main():
            self._job = self._thread.submit((contents.copied() if self.in_background else contents).write, path)

    def written(self, *, wait: bool) -> Path | None:
        """The checkpoint that was being written, once it is there; None where there is none, or it is not there yet.

        Raises CannotWrite, in all processes, where the disk refused it.
        """
        if self._path is None:
            return None
        if not dist.from_main(wait or self._job is None or self._job.done()):
            return None
        path, self._path = self._path, None
        refused = None
        if self._job is not None:
            try:
                self._job.result()
            except CannotWrite as error:
                refused = str(error)
        if (refused := dist.from_main(refused)) is not None:
            raise CannotWrite(refused)
        return path

    def close(self) -> None:
        """Wait until nothing is being written, as is wanted before the process ends or others may use the folder."""
        self._thread.shutdown(wait=True)


def copied(tree: Any) -> Any:
    """A state dict with copies, in the memory of the CPU, of its tensors."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {key: copied(value) for key, value in tree.items()}
    return [copied(value) for value in tree] if isinstance(tree, list) else tree
