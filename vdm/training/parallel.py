"""What is done to a model from outside: activation checkpointing, compilation, several processes. In that order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from vdm import dist
from vdm.data.loader import Batch
from vdm.errors import UserError
from vdm.replay import replay_in_training
from vdm.training.recompute import blocks, recomputed
from vdm.training.settings import AUTOCAST, Recompute, TrainingConfig

Losses = Callable[[Batch], dict[str, Tensor]]


def checkpoint_activations(model: nn.Module, *, how: bool | Recompute) -> None:
    """Compute activations again in the backward pass instead of keeping them; results do not change.

    `how` is `training.gradient_checkpointing`: nothing, what is cheap, or whole blocks.
    """
    if how not in ("cheap", "block"):
        return
    for block in blocks(model):
        block.forward = partial(recomputed, block, block.forward, how)


def compile_blocks(model: nn.Module) -> None:
    """torch.compile every block, anew for each length of clips: inductor cannot be relied on for lengths that vary."""
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 512)  # blocks times lengths
    for block in blocks(model):
        block.compile(dynamic=False)


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
            self._replicas = DistributedDataParallel(
                _Together(modules, losses), broadcast_buffers=False, gradient_as_bucket_view=True
            )
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
            for block in blocks(module):
                fully_shard(block, mp_policy=policy)
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


def parallelize(
    modules: Mapping[str, nn.Module], losses: Losses, settings: TrainingConfig, *, passed: Mapping[str, nn.Module]
) -> Replicas | Shards:
    """Apply what the settings say to the modules that learn, and to those that gradients pass through; `losses`
    computes a task's losses with them."""
    for part, module in passed.items():
        checkpoint_activations(module, how=settings.gradient_checkpointing)
        if settings.compile:
            compile_blocks(module)
        if settings.cuda_graph and part == "unet":
            replay_in_training(module)
    if settings.parallel == "fsdp" and dist.size() > 1:
        return Shards(modules, losses, settings)
    return Replicas(modules, losses)


def require_possible(settings: TrainingConfig, *, there: int, num_clips: int) -> None:
    """Raise UserError where `there` processes cannot train so, or are not as many as is said."""
    claimed = settings.num_gpus
    if claimed not in (None, there):
        raise UserError(
            f"training.num_gpus is {claimed}, but processes are {there}: start torchrun "
            f"--nproc_per_node={claimed} train.py ..., or set training.num_gpus={there} and effective_batch_size"
        )
    clips = settings.batch_size * settings.gradient_accumulation_steps * there
    if settings.effective_batch_size not in (None, clips):
        raise UserError(
            f"training.effective_batch_size is {settings.effective_batch_size}, but with {there} processes a step has "
            f"{clips} clips; set it so, or change batch_size or gradient_accumulation_steps"
        )
    if num_clips < there:
        raise UserError(
            f"there are {num_clips} training clips for {there} processes; start at most as many processes as clips, "
            "or give more clips"
        )
    if settings.cuda_graph and there > 1:
        raise UserError(f"training.cuda_graph is for one process, and here are {there}; leave it out")
    if there > 1 and settings.optimizer_in_backward:
        raise UserError(
            "training.optimizer_in_backward moves weights before processes could exchange gradients; leave it out"
        )
    if there == 1 or settings.parallel == "ddp":
        return
    if settings.task != "unet":
        raise UserError(
            f"training.parallel=fsdp shares out a UNet; what training.task={settings.task} trains is small: set "
            "training.parallel=ddp"
        )
    whole: dict[str, object] = {
        "optimizer": "adamw",
        "optimizer_states": "fp32",
        "weights_dtype": "fp32",
        "ema_offload": False,
        "lora_rank": None,
    }
    for name, only in whole.items():
        if getattr(settings, name) != only:
            raise UserError(
                f"training.{name}={getattr(settings, name)} wants whole weights, of which training.parallel=fsdp gives "
                f"each process a share; leave it out, or set training.parallel=ddp"
            )
