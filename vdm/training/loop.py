"""The training loop: status, validation, checkpoint, step, average, in that order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from vdm import checkpoint, dist
from vdm.config import Config, to_yaml
from vdm.data.loader import Batch
from vdm.errors import CannotWrite
from vdm.files import replacing
from vdm.training.diagnostics import alarms, losses_of, summary
from vdm.training.environment import record_start
from vdm.training.kinds import build_task, warn_of_random_parts
from vdm.training.rehearsal import Rehearsal
from vdm.training.resuming import as_resumed, starting_point
from vdm.training.runlog import NoLog, RunLog
from vdm.training.signals import StopRequest
from vdm.training.throughput import Window
from vdm.training.trainer import Trainer


def train(config: Config, *, resume: str | None = None) -> Path:
    """Train what `config` says in its run folder, and return the folder of the finished model.

    `resume` is "latest" or a checkpoint folder. Raises `UserError` for bad input, a run folder that is in use, or one
    that holds checkpoints though nothing was said of resuming.
    """
    run_dir = Path(config.run_dir)
    with dist.together(), _sole_use(run_dir):
        start = dist.from_main(starting_point(run_dir, resume) if dist.is_main() else None)
        if start is None and dist.is_main():
            warn_of_random_parts(config)
        task = build_task(config if start is None else as_resumed(config, start), dist.device())
        if start is None and config.training.init_from is not None:
            task.start_from(Path(config.training.init_from))  # as long as every process has whole weights
        trainer = Trainer(config, task, run_dir)
        if start is not None:
            trainer.restore(start)
        if dist.is_main():
            with replacing(run_dir / "config.yaml", remedy="free space there or choose another run_dir") as file:
                file.write_text(to_yaml(config), encoding="utf-8")
            record_start(run_dir, step=trainer.step, device=task.device)
        return Loop(trainer).run()


@contextmanager
def _sole_use(run_dir: Path) -> Iterator[None]:
    """The lock on the run folder, which the main process holds for all."""
    with checkpoint.RunLock(run_dir) if dist.is_main() else nullcontext():
        yield


class Loop:
    """A run: steps, and between them what is due."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.settings, self.run_dir = trainer, trainer.settings, trainer.run_dir
        self.rehearsal = Rehearsal(trainer)

    def run(self) -> Path:
        """Train to the first of the limits, or as long as nobody wants it to stop.

        Returns the folder of the finished model, or of the checkpoint to go on from.
        """
        most = self.trainer.limits.steps
        first = self.trainer.step
        self.log = log = RunLog(self.run_dir, first_step=first, num_steps=most) if dist.is_main() else NoLog()
        self.trainer.say = log.say
        log.say(self._outset())
        self.trainer.clock.start()
        stream = self.trainer.train_batches()
        for module in self.trainer.trained.values():
            module.train()
        try:
            with StopRequest() as stop:
                until = min(most, self.settings.stop_after_steps or most)
                self.rehearsal.look(stop, until=until)
                ended = self._steps(stream, log, stop, until=until)
            done = self.trainer.finish() if ended else self._pause()
        finally:
            stream.close()  # stops the data workers now, not when the garbage is collected
            log.close()
            self.trainer.writer.close()
        if not dist.is_main():
            return done
        if ended:
            print(f"finished: {done}")
        else:
            why = stop.name or f"training.stop_after_steps={self.settings.stop_after_steps}"
            print(
                f"stopped after step {self.trainer.step} ({why}): {done}; the same command with --resume latest goes on"
            )
        return done

    def _steps(self, stream: Iterator[Batch], log: RunLog | NoLog, stop: StopRequest, *, until: int) -> bool:
        """Train, with all that is due between steps; returns whether the run is over."""
        settings = self.settings
        window = Window(self.trainer.config, self.trainer.task.device)
        last = self.trainer.ended()
        while not last and self.trainer.step < until and not dist.any_of(stop.name is not None):
            began = time.perf_counter()
            self.trainer.settle(wait=False)
            batches = [next(stream) for _ in range(settings.gradient_accumulation_steps)]
            waited = time.perf_counter() - began
            with self.rehearsal.part("the first step"):
                values = self.trainer.train_step(batches)
            window.add(values, batches, waited=waited, seconds=time.perf_counter() - began)
            self.rehearsal.save(stop)
            log.advance(values["loss"], values["lr"], num_steps=self._expected())
            last = self.trainer.ended()
            held_out = self._look(last)
            if self.trainer.step % settings.log_steps == 0 or last or self.trainer.step == 1 or held_out:
                # A line without a loss would break whoever reads them, so those of step 0 stand in the first.
                log.write(self.trainer.step, window.close() | self.rehearsal.seen | held_out)
                self.rehearsal.seen = {}
            if self.trainer.step % settings.checkpointing_steps == 0 or last:
                self.trainer.save()
        return last

    def _outset(self) -> str:
        """What is ahead, in a line."""
        step, clips, per_step = self.trainer.step, len(self.trainer.clips), self.trainer.clips.batch_size
        told = f"{clips} training clips, {per_step} a step: an epoch is {clips / per_step:.1f} steps"
        return f"{told}; step {step} was in epoch {step * per_step / clips:.2f}" if step else told

    def _expected(self) -> int:
        """How many steps the run will have."""
        return self.trainer.limits.expected(self.trainer.step, seconds=self.trainer.clock.seconds())

    def _pause(self) -> Path:
        """The checkpoint of this step."""
        self.trainer.settle(wait=True)
        if self.trainer.saved_at != self.trainer.step:  # one of that name may be there and be another run's
            self.trainer.save(must=True)
        self.trainer.settle(wait=True, must=True)
        return self.run_dir / f"checkpoint-{self.trainer.step}"

    def _look(self, last: bool) -> dict[str, float]:
        """Validate and preview with the averaged weights, when it is time; returns what is to be logged of it."""
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
                values = self.trainer.validate()
                self.trainer.validated = losses_of(values)
                self.trainer.say(f"step {self.trainer.step}: {summary(values)}")
            if previews:
                values |= self._preview(self.run_dir / "samples" / f"step-{self.trainer.step:06d}")
        for alarm in alarms(values, step=self.trainer.step, num_steps=self._expected(), config=self.trainer.config):
            self.trainer.say(alarm)
        return values

    def _preview(self, folder: Path) -> dict[str, float]:
        try:
            values = self.trainer.preview(folder)
        except CannotWrite as error:
            self.trainer.say(f"warning: {error}; the run goes on without this preview")
            return {}
        self.log.show(self.trainer.step, folder)
        return values
