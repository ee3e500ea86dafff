"""The rehearsal of a run: all that it will do, once and at full size, so that what must fail fails within minutes.

Nothing random is drawn but by the first step itself, which is the run's own: results are the same without it.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vdm import dist
from vdm.errors import CannotWrite, Failure, out_of_memory
from vdm.files import in_words
from vdm.training.diagnostics import summary
from vdm.training.signals import StopRequest
from vdm.training.trainer import Trainer


class Rehearsal:
    """Call `look` before the first step, take that within `part`, and call `save` after it; then it is over.

    Raises Failure or CannotWrite, a sentence that names the part that failed and what to change.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.settings = trainer, trainer.settings
        self.over = not self.settings.rehearsal
        self.took: list[str] = []
        self.seen: dict[str, float] = {}  # what a fresh run's weights were like before its first step, to be logged

    def look(self, stop: StopRequest, *, until: int) -> None:
        """Validate and preview with the weights as they are, if the run ever will, on its way to step `until`.

        What a fresh run shows here stays, as that of step 0; its numbers are `seen`.
        """
        settings, trainer = self.settings, self.trainer
        fresh = trainer.step == 0
        self.over = self.over or trainer.step >= until or dist.any_of(stop.name is not None)
        if self.over:
            return
        if trainer.task.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        values: dict[str, float] = {}
        with trainer.ema.applied():
            if settings.validation_steps:
                with self.part("validation"):
                    values = trainer.validate()
                if fresh:
                    trainer.say(f"step 0: {summary(values)}")
            if settings.preview_steps or settings.validation_steps:
                with self.part("preview"):
                    values |= self._preview(trainer.run_dir / "samples" / "step-000000" if fresh else None)
        if fresh:
            self.seen = values

    def save(self, stop: StopRequest) -> None:
        """Write a checkpoint and remove it."""
        if self.over or dist.any_of(stop.name is not None):
            self.over = True
            return
        folder = self._hidden("rehearsal")
        try:
            with self.part("save"):
                self.trainer.write(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.over = True
        self.trainer.say(f"rehearsal: {', '.join(self.took)}; peak memory {self._peak() / 1e9:.1f} GB")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens within is a part of the rehearsal, unless that is over."""
        if self.over:
            yield
            return
        began = time.perf_counter()
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise Failure(
                f"{name} ran out of memory in the rehearsal of the run; train.py CONFIG --plan --gpu NAME says what it "
                "takes and which options make it fit"
            ) from error
        except (CannotWrite, OSError) as error:
            told = str(error)
            if isinstance(error, OSError):
                told = f"{in_words(error)}{f': {error.filename}' if error.filename else ''}; mend that"
            raise CannotWrite(
                f"{name} failed in the rehearsal of the run: {told}, or go without with training.rehearsal=false"
            ) from error
        self.took.append(f"{name} {time.perf_counter() - began:.1f} s")

    def _preview(self, folder: Path | None) -> dict[str, float]:
        """Of a run that goes on the samples are there already, and this one leaves none."""
        hidden = self._hidden("preview")
        try:
            return self.trainer.preview(folder or hidden)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)

    def _hidden(self, purpose: str) -> Path:
        """A folder of no name that counts, which RunLock clears away should the process be killed."""
        return self.trainer.run_dir / f".{purpose}.tmp-{os.getpid()}"

    def _peak(self) -> int:
        if self.trainer.task.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
