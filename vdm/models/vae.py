"""VideoVAE: the KL autoencoder of latent diffusion (arXiv 2112.10752) on frames, with optional time in its decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm.errors import UserError
from vdm.models.layers import (
    Linear,
    TemporalConv,
    VideoGroupNorm,
    channels_last_weights,
    doubled_conv,
    fold_frames,
    unfold_frames,
    zero_init,
)
from vdm.models.operations import attend
from vdm.models.tiles import LEAST_TILE, decode_tiles

PIXELS = 2**20  # of frames that are encoded or decoded at a time


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the autoencoder; the defaults are Stable Diffusion's, 8x smaller in space with 4 latent channels.

    `temporal_decoder` adds zero-initialised convolutions over frames to the decoder: a trained image VAE stays what
    it was, and flicker can then be trained away. `vae_weights` is what a new run starts from: "shipped" (the demo
    model's), a checkpoint folder, or null (random).
    """

    image_channels: int = 3
    latent_channels: int = 4
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    vae_norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    temporal_decoder: bool = False
    vae_weights: str | None = None

    def __post_init__(self) -> None:
        for key in ("image_channels", "latent_channels", "layers_per_block", "vae_norm_num_groups"):
            if getattr(self, key) < 1:
                raise UserError(f"vae.{key} must be at least 1, got {getattr(self, key)}")
        if not self.vae_channels or any(c < 1 or c % self.vae_norm_num_groups for c in self.vae_channels):
            raise UserError(
                f"vae.vae_channels={self.vae_channels} must all be divisible by "
                f"vae.vae_norm_num_groups={self.vae_norm_num_groups}"
            )
        if self.scaling_factor <= 0:
            raise UserError(f"vae.scaling_factor must be above 0, got {self.scaling_factor}")

    @property
    def factor(self) -> int:
        """Pixels per latent along height and width."""
        return 2 ** (len(self.vae_channels) - 1)


def _conv(in_channels: int, out_channels: int, size: int, *, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    """A convolution that starts orthogonal (arXiv 1312.6120).

    With residual branches at zero the autoencoder starts as a deep linear one, and then learns all directions side by
    side. From the usual smaller weights it learns one after another: colour thousands of steps after brightness.
    """
    conv = nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=padding)
    nn.init.orthogonal_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class ResBlock2D(nn.Module):
    """GN-SiLU-Conv3x3 twice, residual that starts at zero, on frames (N, C, H, W); eps 1e-6."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = _conv(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = zero_init(_conv(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.shortcut: nn.Module = nn.Identity() if same else _conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock2D(nn.Module):
    """GN, one head of self-attention over the positions of a frame, residual; q, k, v have biases here; eps 1e-6."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_qkv = Linear(channels, 3 * channels)
        self.to_out = zero_init(Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (N, H*W, C)
        q, k, v = self.to_qkv(tokens).unsqueeze(1).chunk(3, dim=-1)  # 3 x (N, 1, H*W, C)
        out = self.to_out(attend(q, k, v)[:, 0])
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])


class HalveFrames(nn.Module):
    """Strided 3x3 convolution, padded below and to the right only (as in the original)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DoubleFrames(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return doubled_conv(self.conv, x)


class TimeMix(nn.Module):
    """GN over the video, SiLU, convolution over frames, residual; the convolution starts at zero."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = VideoGroupNorm(groups, channels, eps=1e-6)
        self.conv = zero_init(TemporalConv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


def _middle(channels: int, groups: int) -> list[nn.Module]:
    return [ResBlock2D(channels, channels, groups), AttentionBlock2D(channels, groups),
            ResBlock2D(channels, channels, groups)]  # fmt: skip


class Encoder(nn.Module):
    """Frames (N, image_channels, H, W) -> moments (N, 2*latent_channels, H/f, W/f): mean, then log variance."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.vae_channels, config.vae_norm_num_groups
        layers: list[nn.Module] = [_conv(config.image_channels, widths[0], 3, padding=1)]
        channels = widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.layers_per_block):
                layers.append(ResBlock2D(channels, width, groups))
                channels = width
            if level < len(widths) - 1:
                layers.append(HalveFrames(width))
        layers += _middle(channels, groups)
        moments = 2 * config.latent_channels
        layers += [nn.GroupNorm(groups, channels, eps=1e-6), nn.SiLU(), _conv(channels, moments, 3, padding=1)]
        self.layers = nn.Sequential(*layers, _conv(moments, moments, 1))

    def forward(self, frames: Tensor) -> Tensor:
        return self.layers(frames)


class Decoder(nn.Module):
    """Latents (B, latent_channels, T, h, w) -> video (B, image_channels, T, H, W), one stage per resolution."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.vae_channels[::-1], config.vae_norm_num_groups
        first = [_conv(config.latent_channels, config.latent_channels, 1)]
        first.append(_conv(config.latent_channels, widths[0], 3, padding=1))
        stages: list[list[nn.Module]] = [[*first, *_middle(widths[0], groups)]]
        channels = widths[0]
        for level, width in enumerate(widths):
            stage: list[nn.Module] = [DoubleFrames(channels)] if level else []
            for _ in range(config.layers_per_block + 1):
                stage.append(ResBlock2D(channels, width, groups))
                channels = width
            stages.append(stage)
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        mixed = [widths[0], *widths] if config.temporal_decoder else []
        self.time = nn.ModuleList(TimeMix(width, groups) for width in mixed)
        self.out = nn.Sequential(
            nn.GroupNorm(groups, channels, eps=1e-6),
            nn.SiLU(),
            _conv(channels, config.image_channels, 3, padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        num_frames = z.shape[2]
        x = fold_frames(z)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if self.time:
                x = fold_frames(self.time[i](unfold_frames(x, num_frames)))
        return unfold_frames(self.out(x), num_frames)


class LatentDistribution:
    """Diagonal Gaussian over latents (B, C, T, h, w) of a VAE, from moments (B, 2C, T, h, w): mean, then log variance.

    `mode` and `sample` give latents for diffusion, that is, times `scale`.
    """

    def __init__(self, moments: Tensor, scale: float):
        self.moments = moments
        self.scale = scale
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean * self.scale

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """A draw; from one generator, or each video of the batch from its own. Noise is drawn on the CPU, in fp32."""
        shape = self.mean.shape
        if generator is None or isinstance(generator, torch.Generator):
            noise = torch.randn(shape, generator=generator)
        else:
            if len(generator) != shape[0]:
                raise UserError(f"give each clip its generator: got {len(generator)} generators for {shape[0]} clips")
            noise = torch.stack([torch.randn(shape[1:], generator=one) for one in generator])
        return (self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean, non_blocking=True)) * self.scale

    def kl(self) -> Tensor:
        """KL divergence from the unit Gaussian in nats, (B,), the mean over latent elements."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).mean(1)


class VideoVAE(nn.Module):
    """Video (B, 3, T, H, W) in [-1, 1] <-> latents (B, latent_channels, T, H/f, W/f) of about unit variance.

    The scale of the latents lives here and nowhere else: `encode` multiplies by `scaling_factor`, `decode` divides.
    """

    def __init__(self, config: VAEConfig | None = None):
        super().__init__()
        self.config = config or VAEConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        channels_last_weights(self)

    def encode(self, video: Tensor) -> LatentDistribution:
        """Encode every frame alone; where no gradient is wanted, only so many at a time that memory does not grow with
        the clip. Raises `UserError` where height or width is not divisible by the factor."""
        config = self.config
        if video.dim() != 5 or video.shape[1] != config.image_channels or 0 in video.shape:
            raise UserError(f"video must be (B, {config.image_channels}, T, H, W), got {tuple(video.shape)}")
        if video.shape[3] % config.factor or video.shape[4] % config.factor:
            raise UserError(f"height and width must be divisible by {config.factor}, got {tuple(video.shape[3:])}")
        frames = fold_frames(video.contiguous(memory_format=torch.channels_last_3d)).to(self.dtype)
        few = len(frames) if torch.is_grad_enabled() else max(1, PIXELS // frames[0, 0].numel())
        moments = torch.cat([self.encoder(piece) for piece in frames.split(few)]).to(video.dtype)
        return LatentDistribution(unfold_frames(moments, video.shape[2]), config.scaling_factor)

    def decode(self, z: Tensor, *, tile: int | None = None) -> Tensor:
        """Scaled latents -> video, not clamped; each frame alone unless the decoder has temporal layers.

        Where no gradient is wanted, only so many frames are decoded at a time that memory does not grow with the clip,
        temporal layers aside. `tile`: decode overlapping squares of so many latents and blend them, so that it does not
        grow with the frame either; what lies beyond a square then does not count for it.
        """
        if z.dim() != 5 or z.shape[1] != self.config.latent_channels or 0 in z.shape:
            raise UserError(f"latents must be (B, {self.config.latent_channels}, T, h, w), got {tuple(z.shape)}")
        if tile is not None and tile < LEAST_TILE:
            raise UserError(f"tile must be at least {LEAST_TILE} latents, got {tile}")
        scaled = (z / self.config.scaling_factor).contiguous(memory_format=torch.channels_last_3d).to(self.dtype)
        decode = self.decoder if tile is None else partial(decode_tiles, self.decoder, tile, self.config.factor)
        side = min(z.shape[3], tile or z.shape[3]) * min(z.shape[4], tile or z.shape[4])
        frames = max(1, PIXELS // (side * self.config.factor**2))
        if torch.is_grad_enabled() or self.config.temporal_decoder or z.shape[0] * z.shape[2] <= frames:
            return decode(scaled).to(z.dtype)
        pieces = fold_frames(scaled).split(frames)  # each (N, C, h, w), as clips of one frame
        decoded = torch.cat([decode(piece[:, :, None])[:, :, 0] for piece in pieces])
        return unfold_frames(decoded, z.shape[2]).to(z.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype
