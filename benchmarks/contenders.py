"""Our UNet and diffusers', with the same weights, ready to be timed by train_step.py and sample.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.oracles import randomise, take, their_unet
from vdm.interop.names import unet_links
from vdm.models import UNet3D, UNetConfig
from vdm.replay import Replayed, replay_in_training
from vdm.training.parallel import checkpoint_activations, compile_blocks
from vdm.training.settings import Recompute

EAGER, TUNED = "diffusers-eager", "diffusers-tuned"
RIVALS = ("diffusers", EAGER, TUNED)  # the first is both

# 58.0 M parameters, for CPUs.
SMALL = UNetConfig(unet_dim=64, attention_head_dim=32, context_dim=256)


@dataclass
class Contender:
    """A UNet, called as run(latents, timesteps, context), which computes in `autocast`; None: in its weights' type."""

    name: str
    module: nn.Module
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    autocast: torch.dtype | None = None

    def __call__(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, self.autocast, enabled=self.autocast is not None):
            return self.run(latents, timesteps, context)


def ours(
    config: UNetConfig, device: torch.device, *, autocast: torch.dtype | None, recompute: Recompute, compiled: bool
) -> Contender:
    with device:  # where billions of random numbers take seconds, not minutes
        unet = randomise(UNet3D(config))
    checkpoint_activations(unet, how=recompute)
    if compiled:
        compile_blocks(unet)
    return Contender("vdm", unet, unet, autocast)


def replayed(config: UNetConfig, device: torch.device, *, autocast: torch.dtype | None) -> Contender:
    """Ours by CUDA graphs, in training and without gradients."""
    unet = ours(config, device, autocast=autocast, recompute="none", compiled=False).module
    replay_in_training(unet)
    still = Replayed(unet, device)

    def run(*given: Tensor) -> Tensor:
        out: Tensor = unet(*given) if torch.is_grad_enabled() else still(*given)
        return out

    return Contender("vdm, replayed", unet, run, autocast)


def diffusers_as_it_is(config: UNetConfig, device: torch.device, *, autocast: torch.dtype | None) -> Contender:
    """Eager; with autocast where ours has it. It has no gradient checkpointing."""
    with device:
        unet = randomise(their_unet(config))
    return Contender("diffusers", unet, _called(unet), autocast)


def diffusers_tuned(config: UNetConfig, device: torch.device) -> Contender:
    """bf16 weights, channels_last, compiled."""
    with device:
        unet = channels_last(randomise(their_unet(config)).to(torch.bfloat16))
    return Contender("diffusers tuned", unet, _called(torch.compile(unet, dynamic=False)), torch.bfloat16)


def channels_last(unet: nn.Module) -> nn.Module:
    """The weights of its convolutions over frames' pixels; `.to(memory_format=...)` fails at those over time."""
    for weight in unet.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.to(memory_format=torch.channels_last)
    return unet


def _called(unet: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        out: Tensor = unet(latents, timesteps, context, return_dict=False)[0]
        return out

    return run


def same_weights(mine: Contender, theirs: Contender) -> None:
    """Give ours the other's weights."""
    take(mine.module, unet_links(mine.module.config, "diffusers"), theirs.module.state_dict())  # type: ignore[arg-type]
