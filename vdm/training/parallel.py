"""What is done to a model from outside: activation checkpointing, compilation, several processes. In that order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from vdm import dist
from vdm.data.loader import Batch
from vdm.models.blocks import UNetLayer
from vdm.training.settings import AUTOCAST, TrainingConfig

Losses = Callable[[Batch], dict[str, Tensor]]


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute every UNet layer in the backward pass instead of keeping its activations; results do not change."""
    for module in _layers(model):
        module.forward = partial(_recomputed, module, module.forward)  # type: ignore[method-assign]


def _recomputed(module: nn.Module, forward: Any, *args: Any) -> Any:
    if not module.training:
        return forward(*args)
    return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False)


def _layers(model: nn.Module) -> Iterator[UNetLayer]:
    return (module for module in model.modules() if isinstance(module, UNetLayer))


class Replicas:
    """The processes hold a copy of the model each (DistributedDataParallel); one alone holds the only one.

    `losses` is a task's; in a backward pass the gradients of what it gives are averaged over the processes.
    """

    def __init__(self, modules: Mapping[str, nn.Module], losses: Losses):
        self.losses = losses
        self._replicas: DistributedDataParallel | None = None
        if dist.size() > 1:
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its new name is too new
            # No buffer needs to be sent around: what they hold is either constant or united when it is saved.
            self._replicas = DistributedDataParallel(_Together(modules, losses), broadcast_buffers=False)
            self.losses = self._replicas

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Within the context gradients add up; only those of the last micro-step are exchanged."""
        if self._replicas is None or last:
            yield
        else:
            with self._replicas.no_sync():
                yield


class _Together(nn.Module):
    """All that learns as one module, whose output is the losses, as DistributedDataParallel wants it."""

    def __init__(self, modules: Mapping[str, nn.Module], losses: Losses):
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.losses = losses

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.losses(batch)


class Shards:
    """The processes hold a share of each weight, gradient and optimizer state, and gather a layer when it is its turn
    (FSDP2's `fully_shard`)."""

    def __init__(self, modules: Mapping[str, nn.Module], losses: Losses, settings: TrainingConfig):
        self.losses = losses
        dtype = AUTOCAST[settings.mixed_precision]
        # Gathered in the precision that they are used in, reduced in that of the weights.
        policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
        for module in modules.values():
            _contiguous(module.parameters())
            for layer in _layers(module):
                fully_shard(layer, mp_policy=policy)
            # After validation too the weights are to be shares again, which nothing but this sees to.
            fully_shard(module, mp_policy=policy, reshard_after_forward=True)
            if hasattr(module, "pooled_and_context"):
                register_fsdp_forward_method(module, "pooled_and_context")
        self._roots = [module for module in modules.values() if isinstance(module, FSDPModule)]
        # Nothing changes an output in place, which is what it warns of.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Within the context gradients add up; only those of the last micro-step are exchanged."""
        for root in self._roots:
            root.set_requires_gradient_sync(last)
            root.set_is_last_backward(last)
        yield


def _contiguous(parameters: Iterable[nn.Parameter]) -> None:
    """fully_shard cuts along the first axis of plain memory, and takes no channels_last weight."""
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()


def parallelize(modules: Mapping[str, nn.Module], losses: Losses, settings: TrainingConfig) -> Replicas | Shards:
    """Apply what the settings say to the modules that learn; `losses` computes a task's losses with them."""
    for module in modules.values():
        if settings.gradient_checkpointing != "none":
            checkpoint_activations(module)
        if settings.compile:
            for layer in _layers(module):
                layer.compile()
    if settings.parallel == "fsdp" and dist.size() > 1:
        return Shards(modules, losses, settings)
    return Replicas(modules, losses)
