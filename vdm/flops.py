"""How many floating-point operations a model costs, counted on the meta device, where nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from vdm.config import Config
from vdm.models import UNet3D, UNetConfig, VideoVAE
from vdm.text.encoder import TextEncoder


def count(call: Callable[[], object]) -> int:
    """Operations of the matrix products, convolutions and attention in `call`; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def unet_forward(config: Config, *, num_frames: int) -> int:
    """Of the UNet on one clip of `num_frames` at the size of `data`. A training step is about three times as many."""
    size = (num_frames, config.data.height // config.vae.factor, config.data.width // config.vae.factor)
    return _unet_forward(config.model, size, config.text.context_length)


@cache  # by nothing else of a config, for counting takes a second
def _unet_forward(config: UNetConfig, size: tuple[int, int, int], context_length: int) -> int:
    with torch.device("meta"):
        unet = UNet3D(replace(config, attention_kernel="sdpa"))
        latents = torch.empty(1, config.in_channels, *size)
        context = torch.empty(1, context_length, config.context_dim)
        return count(lambda: unet(latents, torch.zeros(1), context))


@cache
def vae_encode(config: Config, *, num_frames: int) -> int:
    """Of the VAE's encoder on one clip."""
    with torch.device("meta"):
        vae = VideoVAE(config.vae)
        video = torch.empty(1, 3, num_frames, config.data.height, config.data.width)
        return count(lambda: vae.encode(video))


@cache
def vae_decode(config: Config, *, num_frames: int) -> int:
    """Of the VAE's decoder on one clip."""
    with torch.device("meta"):
        vae = VideoVAE(config.vae)
        size = (config.data.height // config.vae.factor, config.data.width // config.vae.factor)
        return count(lambda: vae.decode(torch.empty(1, config.vae.latent_channels, num_frames, *size)))


@cache
def text_forward(config: Config) -> int:
    """Of the text tower on one caption."""
    with torch.device("meta"):
        text = TextEncoder(config.text)
        tokens = torch.zeros(1, config.text.context_length, dtype=torch.long)
        return count(lambda: text.tower(tokens))
