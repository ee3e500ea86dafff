"""What a run would hold in memory and compute: its own code, run once through on imagined tensors.

One training step, one validation, one preview and what a checkpoint writes, of the very trainer that trains.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdm.config import Config
from vdm.data.cache import SPLITS, Cache, Entry, Split
from vdm.data.cache import Plan as CachePlan
from vdm.data.loader import Batch
from vdm.data.quarantine import Bad
from vdm.data.sources import Words
from vdm.memory import Ledger, imagined, tensors_in
from vdm.models import UNet3D
from vdm.training.kinds import build_task
from vdm.training.lora import LoRATask
from vdm.training.parallel import require_possible
from vdm.training.task import Task, UNetTask
from vdm.training.trainer import Trainer

AVERAGES, GRADIENTS, OPTIMIZER = "averaged weights", "gradients", "optimizer"
RECORD = 330  # bytes that a tensor costs in trainer.pt beyond its own


@dataclass(frozen=True)
class Footprint:
    """Bytes by kind at the peak of each phase, of one process; numbers of parameters; a checkpoint's bytes by file.

    The phases are "training step", "validation", "preview" and "save"; a phase that the run has not is left out.
    `step_flops` counts one micro-step, forward and backward, with clips of `data.max_frames`.
    """

    phases: Mapping[str, Mapping[str, int]]
    parameters: Mapping[str, int]
    trained: Mapping[str, int]
    checkpoint: Mapping[str, int]
    final: int
    step_flops: int

    @property
    def peaks(self) -> dict[str, int]:
        return {phase: sum(kinds.values()) for phase, kinds in self.phases.items()}


def footprint(config: Config, *, cuda: bool = True) -> Footprint:
    """Of a run of `config`, on a GPU, or as the CPU would run it. Needs neither data nor weights, and no network.

    Raises UserError where the run itself would, before its first step.
    """
    training = config.training
    require_possible(training, there=training.num_gpus or 1, num_clips=training.num_gpus or 1)
    measured = _measured(_planned(config), rank=config.training.lora_rank, cuda=cuda)
    if not config.training.ema_offload:
        return measured
    phases = {
        phase: {kind: size for kind, size in kinds.items() if kind != AVERAGES}
        for phase, kinds in measured.phases.items()
    }
    return replace(measured, phases=phases)


@cache
def _measured(planned: Config, *, rank: int | None, cuda: bool) -> Footprint:
    with imagined(cuda=cuda) as ledger:
        stand_in = None if planned.data.cache_dir is None else _ImaginedCache(planned)
        here = torch.device("cpu")
        task = (
            build_task(planned, here, cache=stand_in) if rank is None else _ImaginedLoRA(planned, here, stand_in, rank)
        )
        return _Rehearsed(planned, task, ledger).measured()


def _planned(config: Config) -> Config:
    """The config with nothing that has to be there, and nothing that only takes time."""
    training = config.training
    anywhere: dict[str, Any] = {"root": None, "templates": (), "max_clips_per_template": None, "num_clips": None}
    return replace(
        config,
        name="planned",
        run_dir="planned",
        model=replace(config.model, attention_kernel="sdpa"),  # whose fused kernel keeps as much as ours
        data=replace(config.data, format="mini-something", **anywhere),
        vae=replace(config.vae, vae_weights=None),
        text=replace(config.text, text_weights=None),
        sampling=replace(config.sampling, num_inference_steps=min(2, config.sampling.num_inference_steps)),
        training=replace(
            training,
            mixed_precision="bf16" if training.mixed_precision == "fp16" else training.mixed_precision,
            init_from=None,
            lora_rank=None,  # which wants a model to be of
            lora_alpha=None,
            compile=False,
            cuda_graph=False,
            parallel="ddp",
            num_gpus=None,
            effective_batch_size=None,
            diagnostics=False,  # they are more passes of the same size
            ema_offload=False,  # what is kept elsewhere is taken off afterwards
        ),
    )


class _ImaginedCache(Cache):
    """Stands for a cache that may not be there yet."""

    def __init__(self, config: Config) -> None:
        ones: dict[str, int] = dict.fromkeys((*SPLITS, "text"), 1)
        none: dict[str, Bad] = {split: [] for split in SPLITS}
        super().__init__(Path(), CachePlan(num_clips=ones, num_texts=1, per_shard=ones, missing=none, ids="", dtype=""))
        self.shape = (config.text.context_length, config.text.text_width)

    def entries(self, split: Split) -> list[Entry]:
        return [Entry("clip", Words("a clip"))]

    def contexts(self, captions: Sequence[str]) -> Tensor:  # type: ignore[override]
        return torch.empty(len(captions), *self.shape, dtype=torch.float16)


class _ImaginedLoRA(LoRATask):
    """A LoRA of a model that nobody has to read."""

    def __init__(self, config: Config, device: torch.device, cache: Cache | None, rank: int):
        self.rank, self.alpha = rank, float(rank)
        UNetTask.__init__(self, config, device, cache=cache)

    def fill(self, unet: UNet3D) -> str:
        return "imagined"


class _ImaginedTrainer(Trainer):
    """The trainer, with clips of the longest length that nobody has to decode."""

    def batch(self, size: int) -> Batch:
        data, vae = self.config.data, self.config.vae
        kept = data.cache_dir is not None or data.cache_latents
        shape = (
            (2 * vae.latent_channels, data.max_frames, data.height // vae.factor, data.width // vae.factor)
            if kept
            else (3, data.max_frames, data.height, data.width)
        )
        video = torch.empty(size, *shape, dtype=torch.float16 if kept else torch.uint8)
        numbers = list(range(size))
        return Batch(video, ["a caption"] * size, ["clip"] * size, numbers, numbers, [])

    def held_out_batches(self, batch_size: int, *, shared: bool = False) -> Generator[Batch, None, None]:
        yield self.batch(min(batch_size, self.config.data.validation_clips))


class _Rehearsed:
    """A run that is made and taken through its phases on imagined tensors."""

    def __init__(self, config: Config, task: Task, ledger: Ledger) -> None:
        self.ledger = ledger
        self.trainer = _ImaginedTrainer(config, task, Path())
        for part, module in task.modules.items():
            ledger.mark(f"weights of {part}", tensors_in([*module.parameters(), *module.buffers()]))
        for module in self.trainer.trained.values():
            module.train()
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._note_gradient)
        ledger.mark(AVERAGES, tensors_in(vars(self.trainer.ema)))

    def _note_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.ledger.mark(GRADIENTS, [parameter.grad])

    def measured(self) -> Footprint:
        trainer, settings = self.trainer, self.trainer.settings
        phases = {"training step": self._steps()}
        flops = self._flops
        if settings.validation_steps or settings.preview_steps:
            phases |= self._looks(validates=settings.validation_steps > 0)
        self.ledger.watch()
        phases["save"] = self.ledger.peak
        whole, every = trainer.task.whole(), trainer.task.modules | trainer.task.whole()
        learn = {part: [p for p in module.parameters() if p.requires_grad] for part, module in trainer.trained.items()}
        return Footprint(
            phases=phases,
            parameters={part: sum(p.numel() for p in module.parameters()) for part, module in every.items()},
            trained={part: sum(p.numel() for p in some) for part, some in learn.items()},
            checkpoint=self._checkpoint(whole),
            final=sum(_file_bytes(module.state_dict()) for module in whole.values()),
            step_flops=flops,
        )

    def _steps(self) -> dict[str, int]:
        """A second step, when the optimizer's state is there, and in it a micro-step that is not the first."""
        trainer, settings = self.trainer, self.trainer.settings
        before = self.ledger.flops
        trainer.train_step([trainer.batch(settings.batch_size)])
        self._flops = self.ledger.flops - before
        self.ledger.mark(OPTIMIZER, tensors_in(list(trainer.optimizer.state.values())))
        if settings.gradient_accumulation_steps > 1:
            for parameter in trainer.parameters:
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
                    self._note_gradient(parameter)
        self.ledger.watch()
        trainer.train_step([trainer.batch(settings.batch_size)])
        peak = self.ledger.peak
        self.ledger.mark(OPTIMIZER, tensors_in(list(trainer.optimizer.state.values())))  # some are made anew
        return peak

    def _looks(self, *, validates: bool) -> dict[str, dict[str, int]]:
        phases, trainer = {}, self.trainer
        self.ledger.watch()
        with trainer.ema.applied():
            if validates:
                trainer.validate()
                phases["validation"] = self.ledger.peak
                self.ledger.watch()
            batch = next(trainer.held_out_batches(batch_size=8))
            with trainer.autocast():
                trainer.task.measured(trainer.task.shown(batch)[0], batch)
            phases["preview"] = self.ledger.peak
        return phases

    def _checkpoint(self, whole: Mapping[str, nn.Module]) -> dict[str, int]:
        files = {part: _file_bytes(module.state_dict()) for part, module in whole.items()}
        files |= {f"{part}.ema": _file_bytes(self.trainer.ema.state_dict(part)) for part in self.trainer.trained}
        state = [t for t in tensors_in(list(self.trainer.optimizer.state.values()))]
        return files | {"trainer": sum(t.numel() * t.element_size() + RECORD for t in state)}


def _file_bytes(state: Mapping[str, Tensor]) -> int:
    """Of a weight file: the numbers, and a line of the header for each tensor."""
    size, header = 0, 0
    for name, tensor in state.items():
        start, size = size, size + tensor.numel() * tensor.element_size()
        about = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, size]}
        header += len(json.dumps({name: about}, separators=(",", ":")))
    return size + header
