"""The state of a run between steps: one step, one validation, one checkpoint."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from vdm import checkpoint, dist
from vdm.config import Config, to_yaml
from vdm.data.loader import Batch, batches
from vdm.data.quarantine import BadClips
from vdm.errors import CannotWrite, Failure, UserError
from vdm.models.dropout import clip_seeds
from vdm.training.adam import AdamW
from vdm.training.diagnostics import Tally, gradient_norms, other_captions
from vdm.training.draws import DROPOUT, clip_seed
from vdm.training.ema import EMA
from vdm.training.faults import Faults, find_culprits, write_bundle
from vdm.training.in_backward import InBackward
from vdm.training.limits import Clock, Limits
from vdm.training.optim import build_optimizer, learning_rate
from vdm.training.parallel import parallelize, require_possible
from vdm.training.resuming import require_same_run
from vdm.training.saving import Contents, Writer
from vdm.training.settings import autocast
from vdm.training.state import all_weights, finished_weights, load_state, training_state
from vdm.training.task import Task

MAX_FAILED_SAVES = 3  # in a row


class Trainer:
    """What a step changes, and all that a resumed run needs."""

    def __init__(self, config: Config, task: Task, run_dir: Path):
        self.config, self.task, self.run_dir = config, task, run_dir
        self.settings = config.training
        self.step = 0
        self.clips, self.held_out = task.dataset("train"), task.dataset("validation")
        require_possible(self.settings, there=dist.size(), num_clips=self.clips.num_clips)
        self.trained = task.trained()
        if self.settings.weights_dtype == "bf16":
            for module in task.rounded().values():
                module.to(torch.bfloat16)
        losses = partial(self._losses, training=True)
        self.parallel = parallelize(self.trained, losses, self.settings, passed=task.differentiated())
        self.parameters = [p for module in self.trained.values() for p in module.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.trained, self.settings, seed=config.seed)
        self.in_backward: InBackward | None = None
        if self.settings.optimizer_in_backward:
            assert isinstance(self.optimizer, AdamW)
            self.in_backward = InBackward(self.optimizer, max_grad_norm=self.settings.max_grad_norm)
        self.scaler = torch.amp.GradScaler(enabled=self.settings.mixed_precision == "fp16")
        self.ema = EMA(self.trained, decay=self.settings.ema_decay, offload=self.settings.ema_offload)
        record = run_dir / "bad_clips.jsonl"
        self.limits = Limits.of(self.settings, num_clips=len(self.clips), clips_per_step=self.clips.batch_size)
        self.clock = Clock()
        self.bad, self.bad_held_out = BadClips(self.clips, record), BadClips(self.held_out, record)
        self.faults = Faults()
        self.validated: dict[str, float] = {}  # the losses of the last validation
        self.say: Callable[[str], None] = lambda message: print(message, file=sys.stderr)
        in_background = self.settings.save_in_background
        self.failed_saves = 0  # in a row
        self.saved_at: int | None = None  # the step of this run's own last checkpoint
        self.writer = Writer(in_background=task.device.type == "cuda" if in_background is None else in_background)

    def train_batches(self) -> Generator[Batch, None, None]:
        data, micro_steps = self.config.data, self.settings.gradient_accumulation_steps
        stream = batches(
            self.clips,
            batch_size=self.settings.batch_size,
            start_batch=self.step * micro_steps * dist.size(),
            num_workers=data.dataloader_num_workers,
            pin_memory=data.pin_memory,
            rank=dist.rank(),
            num_ranks=dist.size(),
        )
        for batch in stream:
            self.bad.note(batch.bad)
            yield batch

    def held_out_batches(self, batch_size: int, *, shared: bool = False) -> Generator[Batch, None, None]:
        """One pass over the validation clips; of batches that are shared out, this process's own."""
        data = self.config.data
        return batches(
            self.held_out,
            batch_size=batch_size,
            num_workers=data.dataloader_num_workers,
            pin_memory=data.pin_memory,
            rank=dist.rank() if shared else 0,
            num_ranks=dist.size() if shared else 1,
        )

    def _validation(self) -> Iterator[tuple[Batch, bool]]:
        """This process's validation batches, and whether they count.

        Every process gets as many, for together they gather sharded weights; what one gets beyond its own does not.
        """
        size, total = self.settings.batch_size, len(self.held_out)
        with closing(self.held_out_batches(size, shared=True)) as stream:
            batch = None
            for _ in range(-(-total // (size * dist.size()))):
                if (own := next(stream, None)) is not None:
                    batch = own
                elif batch is None:
                    with closing(self.held_out_batches(size)) as others:
                        batch = next(others)
                yield batch, own is not None

    def train_step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """One optimizer step; returns the mean of each loss, the learning rate, the gradient's norm, and how many steps
        were skipped so far: one whose loss or gradient is not finite changes no weight."""
        rates = self._set_rates()
        seen: list[dict[str, Tensor]] = []
        for number, batch in enumerate(micro_batches, start=1):
            with self._dropout(batch), self.parallel.micro_step(last=number == len(micro_batches)):
                values = self.parallel.losses(batch)
                self._backward(values["loss"] / len(micro_batches))
            seen.append({name: value.detach() for name, value in values.items()})
        totals: dict[str, float] = {}
        for values in seen:  # now, and not above, where a GPU would wait for the next micro-step
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + float(value) / len(micro_batches)
        numbers = dist.mean(totals)
        self.scaler.unscale_(self.optimizer)
        norms = gradient_norms(self.trained) if self._logs_this_step() else {}
        norm = self._clip()
        trouble = self._trouble(numbers["loss"], norm)
        if trouble is None or self.scaler.is_enabled():  # which skips steps with such gradients by itself
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if trouble is not None:
            self._skip(micro_batches, trouble)
        elif math.isfinite(norm):  # else the scaler has skipped the step
            self.ema.update()
            self.faults.in_a_row = 0
        self.step += 1
        rates |= {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}
        return {**numbers, **rates, "grad_norm": norm, **norms, "skipped_steps": float(self.faults.skipped)}

    def _logs_this_step(self) -> bool:
        number = self.step + 1
        return number in (1, self.limits.steps) or number % self.settings.log_steps == 0

    def ended(self) -> bool:
        """Whether a limit is reached, by steps or by the clock."""
        return self.limits.reached(self.step, seconds=self.seconds())

    def seconds(self) -> float:
        """What the clock says; in several processes, where it ends the run, that of the main one."""
        return dist.from_main(self.clock.seconds()) if math.isfinite(self.limits.seconds) else self.clock.seconds()

    def _set_rates(self) -> dict[str, float]:
        """Give every group of parameters the learning rate of this step; returns what to log of them."""
        settings = self.settings
        done = self.limits.done(self.step, warmup=settings.warmup_steps, seconds=self.seconds())
        rates = {"lr": learning_rate(self.step, settings, done=done)}
        for group in self.optimizer.param_groups:
            group["lr"] = rates["lr"] * (group["rate"] / settings.learning_rate)
            if group["rate"] != settings.learning_rate:
                rates[f"lr_{group['name']}"] = group["lr"]
        return rates

    def _dropout(self, batch: Batch) -> AbstractContextManager[None]:
        return clip_seeds([clip_seed(self.config.seed, position, DROPOUT) for position in batch.positions])

    def _backward(self, loss: Tensor) -> None:
        if self.in_backward is None:
            self.scaler.scale(loss).backward()
        elif torch.isfinite(loss):
            with self.in_backward.armed():
                loss.backward()
        else:  # nothing may move
            self.in_backward.norm = math.nan

    def _clip(self) -> float:
        """Clip the gradients, where they are still there; returns their norm before that."""
        if self.in_backward is not None:
            return self.in_backward.norm
        return dist.number(torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm))

    def _trouble(self, loss: float, norm: float) -> str | None:
        """What is not finite, if anything is. Gradients may overflow as long as the scaler can be lowered."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm) and not (self.scaler.is_enabled() and self.scaler.get_scale() > 1.0):
            return f"the gradient norm is {norm}"
        return None

    def _skip(self, micro_batches: list[Batch], trouble: str) -> None:
        """Name the clips and modules; after `max_bad_steps` in a row go back to the last checkpoint's weights, and when
        that has not helped, leave a replay bundle and raise FloatingPointError."""
        self.faults.skipped += 1
        self.faults.in_a_row += 1

        def gradients_of(batch: Batch) -> Tensor:
            with self._dropout(batch):
                loss = self._losses(batch, training=True)["loss"]
                loss.backward()
            return loss

        culprits = dist.gathered(find_culprits(micro_batches, self.task.modules, gradients_of))
        told = "; ".join(map(str, chain(*culprits))) or "each clip alone is finite"
        self.say(f"warning: step {self.step + 1} is skipped, for {trouble}: {told}")
        if self.faults.in_a_row % self.settings.max_bad_steps:
            return
        self.settle(wait=True)
        seeks = dist.is_main() and not self.faults.went_back
        good = dist.from_main(checkpoint.latest(self.run_dir) if seeks else None)
        if good is None:
            self._give_up(micro_batches, told)
        load_state(self, good)
        self.faults.went_back = True
        self.say(f"warning: back to the weights of {good.name} after {self.settings.max_bad_steps} such steps in a row")

    def _give_up(self, micro_batches: list[Batch], told: str) -> NoReturn:
        bundle = self.run_dir / f"replay-{self.step + 1}"
        weights = {part: dist.whole(module.state_dict()) for part, module in self.task.modules.items()}
        batches = list(chain(*dist.gathered(micro_batches)))
        if dist.is_main():
            write_bundle(bundle, to_yaml(self.config), weights, batches, step=self.step)
        raise FloatingPointError(
            f"{self.settings.max_bad_steps} steps in a row were not finite, the last for {told}; "
            f"{bundle} holds its weights and clips, and the last checkpoint stands"
        )

    def _losses(self, batch: Batch, *, training: bool) -> dict[str, Tensor]:
        with self.autocast():
            return self.task.losses(batch, training=training)

    def autocast(self) -> torch.autocast:
        """The precision of the run."""
        return autocast(self.settings.mixed_precision, self.task.device)

    @cached_property
    def _other_captions(self) -> list[str]:
        return other_captions(self.held_out.captions) if self.settings.diagnostics else []

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Means over the validation clips, with draws that are the same at every call."""
        tally = Tally()
        for batch, own in self._validation():
            self.bad_held_out.note(batch.bad)
            with self.autocast():
                values = self.task.judge(batch, others=self._other_captions)
            if own:
                tally.add(values)
        return tally.united().numbers()

    def preview(self, folder: Path) -> dict[str, float]:
        """Write what the model makes now, of some validation clips or the configured prompts; returns numbers of it."""
        with closing(self.held_out_batches(batch_size=min(8, len(self.held_out)))) as stream:
            batch = next(stream)
        with self.autocast():
            return self.task.preview(folder, batch)

    def save(self, *, must: bool = False) -> None:
        """Write checkpoint-<step>: all that a resumed run needs to go on bit for bit, and all that sampling needs.

        A disk that is full costs the checkpoint, and the run only when it stays so, or `must` is said: Failure.
        """
        self.settle(wait=True)
        self._begin(self.run_dir / f"checkpoint-{self.step}")
        self.faults.went_back &= self.faults.in_a_row > 0
        self.settle(wait=must or not self.writer.in_background, must=must)

    def write(self, path: Path) -> None:
        """Write all that belongs in a checkpoint to `path`, and change nothing else. Raises CannotWrite."""
        self.settle(wait=True)
        self._begin(path)
        self.writer.written(wait=True)

    def _begin(self, path: Path) -> None:
        seconds = round(self.clock.seconds(), 3)
        about: dict[str, object] = {"step": self.step, "task": self.settings.task, "seconds": seconds}
        about["clips_per_step"] = self.clips.batch_size
        contents = Contents(
            config_yaml=to_yaml(self.config),
            weights=all_weights(self),
            trainer_state=training_state(self),
            info={**about, **self.task.identity(), **self.validated},
            notes=self.task.notes(),
        )
        self.writer.start(path, contents)

    def settle(self, *, wait: bool, must: bool = False) -> None:
        """See to a checkpoint that is being written, if it is there by now, or once it is."""
        try:
            path = self.writer.written(wait=wait)
        except CannotWrite as error:
            self.failed_saves += 1
            if must or self.failed_saves == MAX_FAILED_SAVES:
                raise Failure(str(error)) from error  # nobody's input, but what may be gone when the run is restarted
            self.say(f"warning: {error}; what was there still is, and the run goes on")
            return
        if path is None:
            return
        self.failed_saves, self.saved_at = 0, checkpoint.step_of(path)
        self.task.came_from(path)
        settings = self.settings
        best = "val_loss" if settings.keep_best else None
        retention = checkpoint.Retention(settings.keep_checkpoints, settings.keep_every, best)
        if dist.is_main():
            checkpoint.prune(self.run_dir, retention=retention, until=self.saved_at)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises `UserError` where it belongs to another kind of run."""
        require_same_run(self.config, path)
        info = checkpoint.read_manifest(path).info  # whose files are checked as they are read
        for name, ours in self.task.identity().items():
            if info.get(name) != ours:
                raise UserError(f"{path} is of a run with {name} {info.get(name)}, not {ours}; resume it with that")
        if int(info["step"]) > self.limits.steps:
            raise UserError(
                f"{path} is beyond the {self.limits.steps} steps of this run; raise training.max_train_steps"
            )
        before, now = info.get("clips_per_step"), self.clips.batch_size
        if before not in (None, now) and dist.is_main():
            print(f"note: a step has {now} clips, where {path.name} had {before} (other clips from here on)")
        state = load_state(self, path)
        self.task.came_from(path)
        self.faults = Faults(**state.get("faults", {}))
        self.validated = {name: value for name, value in info.items() if name.startswith("val_")}
        self.step = int(info["step"])
        self.clock.before = float(info.get("seconds", 0.0))

    def finish(self) -> Path:
        """Write the finished model, with the averaged weights, to `final`."""
        self.settle(wait=True)
        final = self.run_dir / "final"
        weights = finished_weights(self)
        if dist.is_main():
            try:
                self.task.write_final(final, self.config, weights, {"step": self.step, "task": self.settings.task})
            except CannotWrite as error:
                raise Failure(
                    f"{error}; the same command with --resume latest writes it from the last checkpoint"
                ) from error
        return final
