"""Once more the step for which a run was given up: each clip of its replay bundle alone, by the bundle's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vdm import checkpoint
from vdm.components import without_sources
from vdm.config import load, override
from vdm.data.loader import Batch
from vdm.errors import UserError
from vdm.models.dropout import clip_seeds
from vdm.training.draws import DROPOUT, clip_seed
from vdm.training.faults import find_culprits
from vdm.training.kinds import build_task
from vdm.training.settings import autocast
from vdm.weights import fill


@dataclass(frozen=True)
class Tried:
    """A clip of the step: its loss, the Euclidean norm of its gradient, and the first module where either is not
    finite, "" where both are."""

    clip: str
    position: int
    caption: str
    loss: float
    grad_norm: float
    module: str

    def __str__(self) -> str:
        told = f"clip {self.clip} (position {self.position}): loss {self.loss:.6g}, gradient {self.grad_norm:.6g}"
        return f"{told}, first in {self.module}" if self.module else told


def replay(bundle: Path, overrides: Sequence[str] = (), *, device: torch.device) -> list[Tried]:
    """Forward and backward pass of every clip of a bundle, with the draws of its step; nothing is changed.

    `overrides` are keys of the config that may help to find the fault, such as training.mixed_precision=no. Raises
    `UserError` where the folder is no bundle, or is damaged.
    """
    manifest = checkpoint.verify(bundle)
    if "batches" not in manifest.info:
        raise UserError(f"{bundle} is no replay bundle; name the folder replay-<step> of a run that was given up")
    config = without_sources(override(load(bundle / checkpoint.CONFIG), overrides))
    task = build_task(config, device)
    for part, module in task.modules.items():
        module.to(device)
        fill(module, checkpoint.load_weights(bundle, part), source=f"{bundle}, {part}")
    if config.training.weights_dtype == "bf16":
        for module in task.rounded().values():
            module.to(torch.bfloat16)
    parameters = [p for module in task.trained().values() for p in module.parameters() if p.requires_grad]
    numbers: dict[int, tuple[float, float]] = {}

    def gradients_of(one: Batch) -> Tensor:
        seeds = [clip_seed(config.seed, position, DROPOUT) for position in one.positions]
        with clip_seeds(seeds), autocast(config.training.mixed_precision, device):
            loss = task.losses(one, training=True)["loss"]
        loss.backward()
        norms = torch._foreach_norm([p.grad.float() for p in parameters if p.grad is not None])
        numbers[one.positions[0]] = float(loss.detach()), float(torch.stack(norms).norm())
        return loss

    batches = list(_batches(bundle, manifest))
    for module in task.trained().values():
        module.train()
    where = {one.position: one.module for one in find_culprits(batches, task.modules, gradients_of)}
    return [
        Tried(clip, position, caption, *numbers[position], where.get(position, ""))
        for batch in batches
        for clip, position, caption in zip(batch.ids, batch.positions, batch.captions, strict=True)
    ]


def _batches(bundle: Path, manifest: checkpoint.Manifest) -> Iterator[Batch]:
    about = manifest.info["batches"]
    assert isinstance(about, list)
    for number, one in enumerate(about):
        video = checkpoint.load_weights(bundle, f"batch-{number}")["video"]
        yield Batch(video=video, bad=[], **one)
