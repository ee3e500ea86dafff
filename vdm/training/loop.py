"""The training loop: status, validation, checkpoint, step, average, in that order."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vdm import checkpoint
from vdm.components import load_part, save_parts, with_sources, without_sources
from vdm.config import Config, load, to_yaml
from vdm.data.loader import Batch, batches
from vdm.data.quarantine import BadClips
from vdm.errors import UserError
from vdm.training.ema import EMA
from vdm.training.optim import build_optimizer, learning_rate
from vdm.training.parallel import checkpoint_activations
from vdm.training.runlog import RunLog
from vdm.training.settings import AUTOCAST
from vdm.training.task import Task, build_task, warn_of_random_parts

DROPOUT = 2  # what a step's random stream is for; the last word of its seed


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
            for part, module in task.trained().items():
                load_part(module, Path(config.training.init_from), part)
            trainer.ema = EMA(task.trained(), decay=config.training.ema_decay)
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        return trainer.run()


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
    return with_sources(config, start) if config.data.cache_dir is not None else without_sources(config)


class Trainer:
    """The state of a run between steps, and one step."""

    def __init__(self, config: Config, task: Task, run_dir: Path):
        self.config, self.task, self.run_dir = config, task, run_dir
        self.settings = config.training
        self.step = 0
        self.trained = task.trained()
        self.parameters = [p for module in self.trained.values() for p in module.parameters()]
        self.optimizer = build_optimizer(self.trained.values(), self.settings)
        self.scaler = torch.amp.GradScaler(enabled=self.settings.mixed_precision == "fp16")
        self.ema = EMA(self.trained, decay=self.settings.ema_decay)
        self.clips, self.held_out = task.dataset("train"), task.dataset("validation")
        record = run_dir / "bad_clips.jsonl"
        self.bad, self.bad_held_out = BadClips(self.clips, record), BadClips(self.held_out, record)
        if self.settings.gradient_checkpointing:
            for module in self.trained.values():
                checkpoint_activations(module)

    def run(self) -> Path:
        """Train to `max_train_steps`; returns the folder of the finished model."""
        settings = self.settings
        log = RunLog(self.run_dir, first_step=self.step, num_steps=settings.max_train_steps)
        stream = self._batches()
        for module in self.trained.values():
            module.train()
        seconds, losses = 0.0, []
        try:
            while self.step < settings.max_train_steps:
                began = time.perf_counter()
                values = self.train_step([next(stream) for _ in range(settings.gradient_accumulation_steps)])
                seconds += time.perf_counter() - began
                losses.append(values["loss"])
                log.advance(values["loss"])
                last = self.step == settings.max_train_steps
                held_out = self._look(log, last)
                if self.step % settings.log_steps == 0 or last or self.step == 1 or held_out:
                    clips = len(losses) * settings.batch_size * settings.gradient_accumulation_steps
                    values |= {"loss": float(np.mean(losses)), "videos_per_second": clips / seconds}
                    log.write(self.step, values | held_out)
                    seconds, losses = 0.0, []
                if self.step % settings.checkpointing_steps == 0 or last:
                    self.save()
            final = self.finish()
        finally:
            stream.close()  # stops the data workers now, not when the garbage is collected
            log.close()
        print(f"finished: {final}")
        return final

    def _batches(self) -> Generator[Batch, None, None]:
        data, micro_steps = self.config.data, self.settings.gradient_accumulation_steps
        stream = batches(
            self.clips,
            batch_size=self.settings.batch_size,
            start_batch=self.step * micro_steps,
            num_workers=data.dataloader_num_workers,
            pin_memory=data.pin_memory,
        )
        for batch in stream:
            self.bad.note(batch.bad)
            yield batch

    def _held_out(self, batch_size: int) -> Generator[Batch, None, None]:
        data = self.config.data
        return batches(
            self.held_out,
            batch_size=batch_size,
            num_workers=data.dataloader_num_workers,
            pin_memory=data.pin_memory,
        )

    def train_step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """One optimizer step; returns the mean of each loss, the learning rate and the gradient's norm."""
        settings = self.settings
        rate = learning_rate(self.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        state = np.random.SeedSequence([self.config.seed, self.step, DROPOUT]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0] >> 1))
        totals: dict[str, Tensor] = {}
        for batch in micro_batches:
            values = self._losses(batch, training=True)
            self.scaler.scale(values["loss"] / len(micro_batches)).backward()
            for name, value in values.items():
                totals[name] = totals.get(name, torch.zeros(())) + value.detach().cpu() / len(micro_batches)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm)
        measured = {"loss": float(totals["loss"])}
        if not self.scaler.is_enabled():  # which skips steps with such gradients by itself
            measured["gradient norm"] = float(norm)
        for name, number in measured.items():
            if not math.isfinite(number):
                raise FloatingPointError(f"the {name} is {number} at step {self.step + 1}; the last checkpoint stands")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.step += 1
        return {**{name: float(value) for name, value in totals.items()}, "lr": rate, "grad_norm": float(norm)}

    def _losses(self, batch: Batch, *, training: bool) -> dict[str, Tensor]:
        dtype = AUTOCAST[self.settings.mixed_precision]
        with torch.autocast(self.task.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.task.losses(batch, training=training)

    def _look(self, log: RunLog, last: bool) -> dict[str, float]:
        """Validate and preview with the averaged weights, when it is time; returns the validation losses, if any."""
        settings = self.settings
        every = settings.validation_steps
        preview_every = settings.preview_steps or every
        validates = bool(every) and (self.step % every == 0 or last)
        previews = bool(preview_every) and (self.step % preview_every == 0 or last)
        values: dict[str, float] = {}
        if not (validates or previews):
            return values
        with self.ema.applied():
            if validates:
                values = self.validate()
                log.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
            if previews:
                with closing(self._held_out(batch_size=min(8, len(self.held_out)))) as stream:
                    self.task.preview(self.run_dir / "samples" / f"step-{self.step:06d}", next(stream))
        return values

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses over the validation clips, with draws that are the same at every call."""
        totals: dict[str, float] = {}
        for batch in self._held_out(self.settings.batch_size):
            self.bad_held_out.note(batch.bad)
            for name, value in self._losses(batch, training=False).items():
                share = len(batch.ids) / len(self.held_out)
                totals[f"val_{name}"] = totals.get(f"val_{name}", 0.0) + float(value) * share
        return totals

    def save(self) -> None:
        """Write checkpoint-<step>: all that a resumed run needs to go on bit for bit, and all that sampling needs."""
        path = self.run_dir / f"checkpoint-{self.step}"
        weights = {part: module.state_dict() for part, module in self.task.whole().items()}
        weights |= {f"{part}.ema": self.ema.state_dict(part) for part in self.trained}
        checkpoint.save_checkpoint(
            path,
            config_yaml=to_yaml(self.config),
            weights=weights,
            trainer_state={
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema_updates": self.ema.num_updates,
            },
            info={"step": self.step, "task": self.settings.task},
        )
        self.task.came_from(path)
        checkpoint.prune(self.run_dir, keep=self.settings.keep_checkpoints)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises `UserError` where it belongs to another model or kind of training."""
        manifest = checkpoint.verify(path)
        info = manifest.info
        if info.get("task") != self.settings.task:
            raise UserError(f"{path} is of a run with training.task={info.get('task')}, not {self.settings.task}")
        learned = {part.removesuffix(".ema") for part in manifest.parts if part.endswith(".ema")}
        if learned and learned != set(self.trained):
            raise UserError(f"{path} is of a run that trained {', '.join(sorted(learned))}; set text.text_trainable so")
        theirs = load(path / checkpoint.CONFIG).training.optimizer
        if theirs != self.settings.optimizer:
            raise UserError(f"{path} is of a run with training.optimizer={theirs}; resume it with that")
        state = checkpoint.load_trainer_state(path)
        # Frozen parts too: what they were first made from may have changed, or be gone.
        for part, module in self.task.modules.items():
            try:
                module.load_state_dict(checkpoint.load_weights(path, part))
            except RuntimeError as error:
                reason = str(error).splitlines()[1].strip()
                raise UserError(f"the {part} weights in {path} do not fit this config: {reason}") from error
        # The moments are the checkpoint's; weight decay and the like are what this run's config says.
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": settings})
        self.scaler.load_state_dict(state["scaler"])
        averages = {part: checkpoint.load_weights(path, f"{part}.ema") for part in self.trained}
        self.ema.load(averages, num_updates=state["ema_updates"])
        self.step = int(info["step"])

    def finish(self) -> Path:
        """Write the finished model, with the averaged weights, to `final`."""
        final = self.run_dir / "final"
        with self.ema.applied():
            save_parts(final, self.config, self.task.whole(), info={"step": self.step, "task": self.settings.task})
        return final
