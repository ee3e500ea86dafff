"""A small model of the original's structure, every weight of which does something."""

from __future__ import annotations

import torch

from vdm.components import build_components
from vdm.config import Config
from vdm.diffusion import SamplingConfig
from vdm.models import UNetConfig, VAEConfig
from vdm.pipeline import TextToVideo
from vdm.text.encoder import TextConfig

CONFIG = Config(
    name="small",
    model=UNetConfig(
        unet_dim=16, channel_mult=(1, 2, 3), attention_levels=(False, True, True), num_res_blocks=1,
        attention_head_dim=8, context_dim=16, norm_num_groups=8,
    ),
    vae=VAEConfig(vae_channels=(8, 16, 16), layers_per_block=1, vae_norm_num_groups=4),
    text=TextConfig(text_width=16, text_heads=2, text_layers=4, context_length=20),
    sampling=SamplingConfig(num_frames=3, height=16, width=24, num_inference_steps=3, guidance_scale=4.0),
)  # fmt: skip


def stirred(config: Config = CONFIG) -> TextToVideo:
    """A model with random weights, also where training starts from zero."""
    pipe = TextToVideo(config, build_components(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in (pipe.unet, pipe.vae, pipe.text_encoder):
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipe
