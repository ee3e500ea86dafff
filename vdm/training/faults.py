"""What to do with numbers that are not finite: find out where they come from, and leave behind what shows it again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vdm.checkpoint import save_checkpoint
from vdm.data.loader import Batch


@dataclass
class Faults:
    """How a run has fared so far."""

    skipped: int = 0  # steps
    in_a_row: int = 0  # of them, up to now
    went_back: bool = False  # to a checkpoint, and made none of a good step since


@dataclass(frozen=True)
class Culprit:
    """A clip whose loss or gradient is not finite, and the first module where that shows."""

    clip: str
    position: int
    module: str

    def __str__(self) -> str:
        return f"clip {self.clip} (position {self.position}), first in {self.module}"


def mean_of_finite(values: Sequence[float]) -> float:
    """The mean of those that are finite; NaN where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def find_culprits(
    batches: Sequence[Batch], modules: Mapping[str, nn.Module], gradients_of: Callable[[Batch], Tensor]
) -> list[Culprit]:
    """Try each clip of some micro-batches alone; `gradients_of` does its backward pass and gives its loss. Gradients
    are gone afterwards.

    No culprit means that every clip alone is fine, and only their sum too large. All clips are tried in full, for where
    weights are sharded every process must do the same.
    """
    found = []
    for batch in batches:
        for number in range(len(batch.ids)):
            one = single(batch, number)
            with first_not_finite(modules) as seen:
                loss = gradients_of(one)
            module = next(_traces(seen, loss, modules), "")
            for part in modules.values():
                part.zero_grad(set_to_none=True)
            if module:
                found.append(Culprit(one.ids[0], one.positions[0], module))
    return found


def single(batch: Batch, number: int) -> Batch:
    """One clip of a batch, as a batch."""
    chosen = slice(number, number + 1)
    lists = {name: getattr(batch, name)[chosen] for name in ("captions", "ids", "indices", "positions")}
    return replace(batch, video=batch.video[chosen], **lists)


@dataclass(frozen=True)
class Seen:
    """The names of the modules whose output is not finite, or the gradient of it, in the order in which they came.

    A module's parts come before it, so the first of the outputs is the innermost.
    """

    outputs: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)


def _traces(seen: Seen, loss: Tensor, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Where what is not finite shows, the first place first."""
    yield from seen.outputs
    if not torch.isfinite(loss):
        yield "the loss"
    if not any(isinstance(p, DTensor) for module in modules.values() for p in module.parameters()):
        yield from _bad_gradients(modules)
    else:  # a sharded weight's gradient is that of all processes' clips
        yield from (f"the gradient at {name}" for name in seen.gradients)


@contextmanager
def first_not_finite(modules: Mapping[str, nn.Module]) -> Iterator[Seen]:
    """Within the context, what a forward and a backward pass see."""
    seen = Seen()

    def finite(tensor: Tensor) -> bool:
        return bool(torch.isfinite(tensor).all())

    def hook(name: str) -> Callable[..., None]:
        def look_back(gradient: Tensor) -> None:
            if not finite(gradient):
                seen.gradients.append(name)

        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    continue
                if not finite(tensor):
                    seen.outputs.append(name)
                if tensor.requires_grad:
                    tensor.register_hook(look_back)

        return look

    handles = [
        module.register_forward_hook(hook(f"{part}.{name}".rstrip(".")))
        for part, whole in modules.items()
        for name, module in whole.named_modules()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _bad_gradients(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Parameters whose gradient is not finite, the last of each part first, for that is where gradients come from."""
    for part, module in modules.items():
        for name, parameter in reversed(list(module.named_parameters())):
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                yield f"the gradient of {part}.{name}"


def write_bundle(
    path: Path, config_yaml: str, weights: Mapping[str, Mapping[str, Tensor]], batches: Sequence[Batch], *, step: int
) -> None:
    """A folder with all that a step depends on: weights, config, clips as they were read, and the number of the step.

    `batch-<i>.safetensors` holds a micro-batch's `video`; captions, ids and positions are the manifest's.
    """
    clips = {f"batch-{number}": {"video": batch.video.contiguous()} for number, batch in enumerate(batches)}
    about = [{"ids": b.ids, "captions": b.captions, "positions": b.positions, "indices": b.indices} for b in batches]
    info = {"step": step, "batches": json.loads(json.dumps(about))}
    save_checkpoint(path, config_yaml=config_yaml, weights={**weights, **clips}, info=info)
