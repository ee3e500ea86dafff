"""UNet3D: the factorized 2D+1D denoiser of ModelScopeT2V (arXiv 2308.06571) at any size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm.errors import UserError
from vdm.models.attention import SpatialTransformer, TemporalTransformer
from vdm.models.blocks import DecoderLayer, Pass, ResBlock, TemporalConvBlock, UNetLayer
from vdm.models.dropout import number_layers
from vdm.models.fused import AttentionKernel, choose
from vdm.models.layers import (
    Downsample,
    FrameConv,
    FrameGroupNorm,
    KeepSize,
    TimeEmbedding,
    Upsample,
    as_many,
    channels_last_weights,
)


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the UNet; the defaults are the original's 1,411,233,860 parameters.

    `attention_heads` counts the heads of the temporal transformer after the first convolution; everywhere else
    heads = channels / `attention_head_dim`. `model_type: spatial` leaves every temporal layer out: the image model.
    """

    model_type: Literal["modelscope", "spatial"] = "modelscope"
    in_channels: int = 4
    unet_dim: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    num_res_blocks: int = 2
    attention_heads: int = 8
    attention_head_dim: int = 64
    temporal_layers: int = 4
    context_dim: int = 1024
    norm_num_groups: int = 32
    dropout: float = 0.0
    temporal_dropout: float = 0.1
    max_num_frames: int | None = None
    attention_kernel: AttentionKernel = "auto"  # of attention over frames, gates and norms

    def __post_init__(self) -> None:
        counts = ("in_channels", "unet_dim", "num_res_blocks", "attention_heads", "attention_head_dim")
        for key in (*counts, "temporal_layers", "context_dim", "norm_num_groups"):
            if getattr(self, key) < 1:
                raise UserError(f"model.{key} must be at least 1, got {getattr(self, key)}")
        if not self.channel_mult or len(self.channel_mult) != len(self.attention_levels):
            raise UserError(
                f"model.channel_mult has {len(self.channel_mult)} levels but model.attention_levels has "
                f"{len(self.attention_levels)}; give both one entry per level"
            )
        if min(self.channel_mult) < 1:
            raise UserError(f"model.channel_mult must hold numbers of at least 1, got {self.channel_mult}")
        if self.unet_dim % 2:
            raise UserError(f"model.unet_dim={self.unet_dim} must be even (half sines, half cosines of the time step)")
        for channels in self.channels:
            if channels % self.norm_num_groups:
                raise UserError(f"{channels} channels do not divide into model.norm_num_groups={self.norm_num_groups}")
            if channels % self.attention_head_dim:
                raise UserError(
                    f"{channels} channels do not divide by model.attention_head_dim={self.attention_head_dim}"
                )
        for key in ("dropout", "temporal_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"model.{key} must be at least 0 and below 1, got {getattr(self, key)}")
        if self.max_num_frames is not None and self.max_num_frames < 1:
            raise UserError(f"model.max_num_frames must be at least 1 or null, got {self.max_num_frames}")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels at each level, from the full latent size down."""
        return tuple(self.unet_dim * mult for mult in self.channel_mult)


class UNet3D(nn.Module):
    """Predict the target of diffusion for noisy latents, given the time step and the text.

    Args of `forward`:
        latents: (B, in_channels, T, h, w), any h and w, any float dtype.
        timesteps: (B,) integers or floats in [0, num_train_timesteps).
        context: text (B, L, context_dim); or (k*B, L, context_dim), k texts for each video in the order of
            `torch.cat([texts_0, texts_1, ...])`: all k share what is computed before text comes in.

    Returns (B or k*B, in_channels, T, h, w) in the dtype of `latents`; raises `UserError` on other shapes.
    """

    def __init__(self, config: UNetConfig | None = None):
        super().__init__()
        self.config = config = config or UNetConfig()
        self.operations = choose(config.attention_kernel)
        dim, widths = config.unet_dim, config.channels
        self.time_embedding = TimeEmbedding(dim)
        self.conv_in = FrameConv(config.in_channels, dim, 3, padding=1)
        self.transformer_in = self._temporal(dim, config.attention_heads)

        skips, channels = [dim], dim
        self.encoder = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.encoder.append(self._layer(channels, width, config.attention_levels[level]))
                skips.append(channels := width)
            if level < len(widths) - 1:
                self.encoder.append(Downsample(width))
                skips.append(width)

        self.middle = nn.ModuleList([self._layer(channels, channels, True), self._layer(channels, channels, False)])

        self.decoder = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                up = Upsample(channels) if i == 0 and level < len(widths) - 1 else KeepSize()
                layer = self._layer(channels + skips.pop(), width, config.attention_levels[level])
                self.decoder.append(DecoderLayer(up, layer))
                channels = width

        self.norm_out = FrameGroupNorm(
            config.norm_num_groups, dim * config.channel_mult[0], silu=True, operations=self.operations
        )
        self.conv_out = FrameConv(dim * config.channel_mult[0], config.in_channels, 3, padding=1)
        number_layers(self)
        channels_last_weights(self)

    def _temporal(self, channels: int, heads: int) -> nn.Module:
        config = self.config
        if config.model_type == "spatial":
            return Pass()
        return TemporalTransformer(channels, heads, config.attention_head_dim, config.norm_num_groups, self.operations)

    def _layer(self, in_channels: int, channels: int, attention: bool) -> UNetLayer:
        config = self.config
        heads, head_dim, groups = (
            channels // config.attention_head_dim,
            config.attention_head_dim,
            config.norm_num_groups,
        )
        return UNetLayer(
            ResBlock(in_channels, channels, 4 * config.unet_dim, groups, config.dropout, self.operations),
            Pass()
            if config.model_type == "spatial"
            else TemporalConvBlock(channels, config.temporal_layers, groups, config.temporal_dropout, self.operations),
            SpatialTransformer(channels, heads, head_dim, config.context_dim, groups, self.operations)
            if attention
            else Pass(),
            self._temporal(channels, heads) if attention else Pass(),
        )

    def _check(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> None:
        config = self.config
        if latents.dim() != 5 or latents.shape[1] != config.in_channels or 0 in latents.shape:
            raise UserError(f"latents must be (B, {config.in_channels}, T, h, w), got {tuple(latents.shape)}")
        if config.max_num_frames is not None and latents.shape[2] > config.max_num_frames:
            raise UserError(f"{latents.shape[2]} frames exceed model.max_num_frames={config.max_num_frames}")
        if timesteps.shape != latents.shape[:1]:
            raise UserError(f"timesteps must be ({latents.shape[0]},), got {tuple(timesteps.shape)}")
        fits = context.dim() == 3 and context.shape[2] == config.context_dim and 0 not in context.shape
        if not fits or context.shape[0] % latents.shape[0]:
            raise UserError(
                f"context must be (k*{latents.shape[0]}, L, {config.context_dim}), got {tuple(context.shape)}"
            )

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        self._check(latents, timesteps, context)
        x = latents.contiguous(memory_format=torch.channels_last_3d).to(self.conv_in.weight.dtype)
        context = context.to(x.dtype)
        emb = F.silu(self.time_embedding(timesteps))
        x = self.transformer_in(self.conv_in(x), emb, context)
        # Videos become as many as texts where they first meet; what needs the step or the past follows them.
        skips = [x]
        for block in self.encoder:
            x = block(x, emb, context)
            emb = as_many(emb, x)
            skips.append(x)
        for block in self.middle:
            x = block(x, emb, context)
            emb = as_many(emb, x)
        for block in self.decoder:
            x = block(x, as_many(skips.pop(), x), emb, context)
        return self.conv_out(self.norm_out(x)).to(latents.dtype)
