"""The training loop: status, validation, checkpoint, step, average, in that order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch

from vdm import checkpoint
from vdm.components import with_sources, without_sources
from vdm.config import Config, to_yaml
from vdm.data.loader import Batch
from vdm.errors import CannotWrite, UserError
from vdm.training.ema import EMA
from vdm.training.faults import mean_of_finite
from vdm.training.runlog import RunLog
from vdm.training.signals import StopRequest
from vdm.training.task import build_task, warn_of_random_parts
from vdm.training.trainer import Trainer

MAX_FAILED_SAVES = 3  # in a row


def train(config: Config, *, resume: str | None = None) -> Path:
    """Train what `config` says in its run folder, and return the folder of the finished model.

    `resume` is "latest" or a checkpoint folder. Raises `UserError` for bad input, a run folder that is in use, or one
    that holds checkpoints though nothing was said of resuming.
    """
    run_dir = Path(config.run_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with checkpoint.RunLock(run_dir):
        start = _start(run_dir, resume)
        if start is None:
            warn_of_random_parts(config)
        task = build_task(config if start is None else _from_checkpoint(config, start), device)
        trainer = Trainer(config, task, run_dir)
        if start is not None:
            trainer.restore(start)
        elif config.training.init_from is not None:
            task.start_from(Path(config.training.init_from))
            trainer.ema = EMA(task.trained(), decay=config.training.ema_decay)
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        return Loop(trainer).run()


def _start(run_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from, if any."""
    if resume is None:
        if checkpoint.list_checkpoints(run_dir) or (run_dir / "final").exists():
            raise UserError(
                f"{run_dir} already holds checkpoints; go on with --resume latest, or choose another run_dir"
            )
        return None
    if resume != "latest":
        checkpoint.verify(resume)
        return Path(resume)
    newest = checkpoint.latest(run_dir)
    print(f"resuming from {newest}" if newest else f"no checkpoint in {run_dir} yet: starting afresh")
    return newest


def _from_checkpoint(config: Config, start: Path) -> Config:
    """The config to build a resumed task from: what its parts were first made from is history."""
    if config.training.lora_rank is not None:
        return config  # of which a checkpoint holds no more than the change
    return with_sources(config, start) if config.data.cache_dir is not None else without_sources(config)


class Loop:
    """A run: steps, and between them what is due."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.settings, self.run_dir = trainer, trainer.settings, trainer.run_dir
        self.failed_saves = 0
        self.saved_at: int | None = None  # the step of this run's own last checkpoint

    def run(self) -> Path:
        """Train to `max_train_steps`, or as long as nobody wants it to stop.

        Returns the folder of the finished model, or of the checkpoint to go on from.
        """
        most = self.settings.max_train_steps
        log = RunLog(self.run_dir, first_step=self.trainer.step, num_steps=most)
        self.trainer.say = log.say
        stream = self.trainer.train_batches()
        for module in self.trainer.trained.values():
            module.train()
        try:
            with StopRequest() as stop:
                self._steps(stream, log, stop, until=min(most, self.settings.stop_after_steps or most))
            done = self.trainer.finish() if self.trainer.step == most else self._pause()
        finally:
            stream.close()  # stops the data workers now, not when the garbage is collected
            log.close()
        if self.trainer.step == most:
            print(f"finished: {done}")
        else:
            why = stop.name or f"training.stop_after_steps={self.settings.stop_after_steps}"
            print(
                f"stopped after step {self.trainer.step} ({why}): {done}; the same command with --resume latest goes on"
            )
        return done

    def _steps(self, stream: Iterator[Batch], log: RunLog, stop: StopRequest, *, until: int) -> None:
        settings = self.settings
        seconds, losses = 0.0, []
        while self.trainer.step < until and stop.name is None:
            began = time.perf_counter()
            values = self.trainer.train_step([next(stream) for _ in range(settings.gradient_accumulation_steps)])
            seconds += time.perf_counter() - began
            losses.append(values["loss"])
            log.advance(values["loss"])
            last = self.trainer.step == settings.max_train_steps
            held_out = self._look(last)
            if self.trainer.step % settings.log_steps == 0 or last or self.trainer.step == 1 or held_out:
                clips = len(losses) * settings.batch_size * settings.gradient_accumulation_steps
                values |= {"loss": mean_of_finite(losses), "videos_per_second": clips / seconds}
                log.write(self.trainer.step, values | held_out)
                seconds, losses = 0.0, []
            if self.trainer.step % settings.checkpointing_steps == 0 or last:
                self._try_to_save()

    def _pause(self) -> Path:
        """The checkpoint of this step."""
        if self.saved_at != self.trainer.step:  # one of that name may be there and be another run's
            self.trainer.save()
        return self.run_dir / f"checkpoint-{self.trainer.step}"

    def _try_to_save(self) -> None:
        """Save; a disk that is full costs the checkpoint, and the run only when it stays so."""
        try:
            self.trainer.save()
            self.failed_saves, self.saved_at = 0, self.trainer.step
        except CannotWrite as error:
            self.failed_saves += 1
            if self.failed_saves == MAX_FAILED_SAVES:
                raise
            self.trainer.say(f"warning: {error}; what was there still is, and the run goes on")

    def _look(self, last: bool) -> dict[str, float]:
        """Validate and preview with the averaged weights, when it is time; returns the validation losses, if any."""
        settings = self.settings
        every = settings.validation_steps
        preview_every = settings.preview_steps or every
        validates = bool(every) and (self.trainer.step % every == 0 or last)
        previews = bool(preview_every) and (self.trainer.step % preview_every == 0 or last)
        values: dict[str, float] = {}
        if not (validates or previews):
            return values
        with self.trainer.ema.applied():
            if validates:
                values = self.trainer.validated = self.trainer.validate()
                self.trainer.say(
                    f"step {self.trainer.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items())
                )
            if previews:
                self._preview(self.run_dir / "samples" / f"step-{self.trainer.step:06d}")
        return values

    def _preview(self, folder: Path) -> None:
        try:
            with closing(self.trainer.held_out_batches(batch_size=min(8, len(self.trainer.held_out)))) as stream:
                self.trainer.task.preview(folder, next(stream))
        except CannotWrite as error:
            self.trainer.say(f"warning: {error}; the run goes on without this preview")
