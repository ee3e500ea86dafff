"""The state of a run between steps: one step, one validation, one checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from vdm import checkpoint
from vdm.config import Config, load, to_yaml
from vdm.data.loader import Batch, batches
from vdm.data.quarantine import BadClips
from vdm.errors import UserError
from vdm.training.ema import EMA
from vdm.training.faults import Faults, find_culprits, write_bundle
from vdm.training.optim import build_optimizer, learning_rate
from vdm.training.parallel import checkpoint_activations
from vdm.training.settings import AUTOCAST
from vdm.training.task import Task

DROPOUT = 2  # what a step's random stream is for; the last word of its seed


class Trainer:
    """What a step changes, and all that a resumed run needs."""

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
        self.faults = Faults()
        self.validated: dict[str, float] = {}  # the losses of the last validation
        self.say: Callable[[str], None] = lambda message: print(message, file=sys.stderr)
        if self.settings.gradient_checkpointing != "none":
            for module in task.differentiated().values():
                checkpoint_activations(module)

    def train_batches(self) -> Generator[Batch, None, None]:
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

    def held_out_batches(self, batch_size: int) -> Generator[Batch, None, None]:
        data = self.config.data
        return batches(
            self.held_out,
            batch_size=batch_size,
            num_workers=data.dataloader_num_workers,
            pin_memory=data.pin_memory,
        )

    def train_step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """One optimizer step; returns the mean of each loss, the learning rate, the gradient's norm, and how many steps
        were skipped so far: one whose loss or gradient is not finite changes no weight."""
        rate = learning_rate(self.step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._seed_dropout()
        totals: dict[str, Tensor] = {}
        for batch in micro_batches:
            values = self._losses(batch, training=True)
            self.scaler.scale(values["loss"] / len(micro_batches)).backward()
            for name, value in values.items():
                totals[name] = totals.get(name, torch.zeros(())) + value.detach().cpu() / len(micro_batches)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        trouble = self._trouble(totals["loss"], norm)
        if trouble is None or self.scaler.is_enabled():  # which skips steps with such gradients by itself
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if trouble is None:
            self.ema.update()
            self.faults.in_a_row = 0
        else:
            self._skip(micro_batches, trouble)
        self.step += 1
        numbers = {name: float(value) for name, value in totals.items()}
        return {**numbers, "lr": rate, "grad_norm": float(norm), "skipped_steps": float(self.faults.skipped)}

    def _seed_dropout(self) -> None:
        state = np.random.SeedSequence([self.config.seed, self.step, DROPOUT]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0] >> 1))

    def _trouble(self, loss: Tensor, norm: Tensor) -> str | None:
        """What is not finite, if anything is. Gradients may overflow as long as the scaler can be lowered."""
        if not torch.isfinite(loss):
            return f"the loss is {float(loss)}"
        if not torch.isfinite(norm) and not (self.scaler.is_enabled() and self.scaler.get_scale() > 1.0):
            return f"the gradient norm is {float(norm)}"
        return None

    def _skip(self, micro_batches: list[Batch], trouble: str) -> None:
        """Name the clips and modules; after `max_bad_steps` in a row go back to the last checkpoint's weights, and when
        that has not helped, leave a replay bundle and raise FloatingPointError."""
        self.faults.skipped += 1
        self.faults.in_a_row += 1

        def loss_of(batch: Batch) -> Tensor:
            self._seed_dropout()
            return self._losses(batch, training=True)["loss"]

        culprits = find_culprits(micro_batches, self.task.modules, loss_of)
        told = "; ".join(map(str, culprits)) or "each clip alone is finite"
        self.say(f"warning: step {self.step + 1} is skipped, for {trouble}: {told}")
        if self.faults.in_a_row % self.settings.max_bad_steps:
            return
        good = None if self.faults.went_back else checkpoint.latest(self.run_dir)
        if good is None:
            self._give_up(micro_batches, told)
        self._load_state(good)
        self.faults.went_back = True
        self.say(f"warning: back to the weights of {good.name} after {self.settings.max_bad_steps} such steps in a row")

    def _give_up(self, micro_batches: list[Batch], told: str) -> NoReturn:
        bundle = self.run_dir / f"replay-{self.step + 1}"
        write_bundle(bundle, to_yaml(self.config), self.task.modules, micro_batches, step=self.step)
        raise FloatingPointError(
            f"{self.settings.max_bad_steps} steps in a row were not finite, the last for {told}; "
            f"{bundle} holds its weights and clips, and the last checkpoint stands"
        )

    def _losses(self, batch: Batch, *, training: bool) -> dict[str, Tensor]:
        dtype = AUTOCAST[self.settings.mixed_precision]
        with torch.autocast(self.task.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.task.losses(batch, training=training)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses over the validation clips, with draws that are the same at every call."""
        totals: dict[str, float] = {}
        for batch in self.held_out_batches(self.settings.batch_size):
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
                "faults": asdict(self.faults),
            },
            info={"step": self.step, "task": self.settings.task, **self.task.identity(), **self.validated},
            notes=self.task.notes(),
        )
        self.faults.went_back &= self.faults.in_a_row > 0
        self.task.came_from(path)
        settings = self.settings
        best = "val_loss" if settings.keep_best else None
        retention = checkpoint.Retention(settings.keep_checkpoints, settings.keep_every, best)
        checkpoint.prune(self.run_dir, retention=retention)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises `UserError` where it belongs to another model or kind of training."""
        manifest = checkpoint.verify(path)
        info = manifest.info
        if info.get("task") != self.settings.task:
            raise UserError(f"{path} is of a run with training.task={info.get('task')}, not {self.settings.task}")
        learned = {part.removesuffix(".ema") for part in manifest.parts if part.endswith(".ema")}
        if learned and learned != set(self.trained):
            remedy = "set text.text_trainable and training.lora_rank so"
            raise UserError(f"{path} is of a run that trained {', '.join(sorted(learned))}; {remedy}")
        for name, ours in self.task.identity().items():
            if info.get(name) != ours:
                raise UserError(f"{path} is of a run with {name} {info.get(name)}, not {ours}; resume it with that")
        theirs = load(path / checkpoint.CONFIG).training.optimizer
        if theirs != self.settings.optimizer:
            raise UserError(f"{path} is of a run with training.optimizer={theirs}; resume it with that")
        state = self._load_state(path)
        self.task.came_from(path)
        self.faults = Faults(**state.get("faults", {}))
        self.validated = {name: value for name, value in info.items() if name.startswith("val_")}
        self.step = int(info["step"])

    def _load_state(self, path: Path) -> dict[str, Any]:
        """Take weights, optimizer, scaler and averages from a checkpoint; returns its trainer state."""
        state = checkpoint.load_trainer_state(path)
        # Frozen parts too: what they were first made from may have changed, or be gone.
        for part, module in self.task.saved().items():
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
        return dict(state)

    def finish(self) -> Path:
        """Write the finished model, with the averaged weights, to `final`."""
        final = self.run_dir / "final"
        with self.ema.applied():
            self.task.write_final(final, {"step": self.step, "task": self.settings.task})
        return final
