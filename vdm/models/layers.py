"""Layers with no opinion about video: folding frames, initialising at zero, embedding time, resizing in space.

A video between modules is always (B, C, T, H, W), kept in `channels_last_3d` memory, i.e. laid out as (B, T, H, W, C).
In that layout the fold to frames (B*T, C, H, W) and the tokens (B, T, H*W, C) are views; nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm.models import onednn
from vdm.models.onednn import Packable, convolve
from vdm.models.operations import PLAIN, Operations

Layer = TypeVar("Layer", bound=nn.Module)


def fold_frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W): a view when x is channels_last_3d."""
    # Channels last meanwhile: else a single frame is a view with a stride by which no kernel knows its layout.
    return x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


def unfold_frames(x: Tensor, num_frames: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W): the inverse of `fold_frames`, always a view."""
    return x.permute(0, 2, 3, 1).unflatten(0, (-1, num_frames)).permute(0, 4, 1, 2, 3)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, T, H*W, C): a view when x is channels_last_3d."""
    return x.permute(0, 2, 3, 4, 1).flatten(2, 3)


def from_tokens(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, T, H*W, C) -> (B, C, T, H, W) in channels_last_3d memory: the inverse of `to_tokens`, always a view."""
    return x.unflatten(2, size).permute(0, 4, 1, 2, 3)


def to_image(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, C, T, H*W), an image whose rows are frames: a view when x is channels_last_3d."""
    return to_tokens(x).permute(0, 3, 1, 2)


def from_image(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, T, H*W) -> (B, C, T, H, W): the inverse of `to_image`, always a view."""
    return from_tokens(x.permute(0, 2, 3, 1), size)


def as_many(x: Tensor, like: Tensor) -> Tensor:
    """Repeat a batch x (B, ...) whole, to the (k*B, ...) of `like`; x itself where they are as many."""
    copies = like.shape[0] // x.shape[0]
    return x if copies == 1 else torch.cat([x] * copies)


def zero_init(layer: Layer) -> Layer:
    """Set every parameter of `layer` to zero, so that the residual branch it ends adds nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def channels_last_weights(module: nn.Module) -> None:
    """Lay the weights of every convolution out as their inputs are, so that no kernel has to reorder them."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            channels_last = torch.channels_last if layer.weight.dim() == 4 else torch.channels_last_3d
            layer.weight.data = layer.weight.data.contiguous(memory_format=channels_last)


def sinusoidal_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Timesteps (B,) -> fp32 (B, dim): cosines first, frequencies 10000^(-i / (dim/2)) (DDPM, arXiv 2006.11239)."""
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    # In this order the frequencies round as diffusers' do: at step 999 an ulp of one is 6e-5 of an angle.
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000) * index / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Linear(Packable, nn.Linear):
    """nn.Linear; in float32 on a CPU by oneDNN's product, with the bias in it.

    On some machines that is a tenth to a fifth faster than the BLAS that PyTorch asks otherwise, and on none slower.
    """

    def forward(self, x: Tensor) -> Tensor:
        return onednn.linear(self, x) if onednn.by_onednn(x, self.weight) else super().forward(x)


class TimeEmbedding(nn.Module):
    """Timesteps (B,) -> (B, 4*dim): sinusoid, Linear, SiLU, Linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.linear1 = Linear(dim, 4 * dim)
        self.linear2 = Linear(4 * dim, 4 * dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        x = sinusoidal_embedding(timesteps, self.dim).to(self.linear1.weight.dtype)
        return self.linear2(F.silu(self.linear1(x)))


class FrameConv(Packable, nn.Conv2d):
    """A Conv2d on every frame of (B, C, T, H, W) alone."""

    def forward(self, x: Tensor) -> Tensor:
        y = convolve(
            self, "weight", lambda: self.weight, self.bias, fold_frames(x), stride=self.stride, padding=self.padding
        )
        return unfold_frames(y, x.shape[2])


class _GroupNorm(nn.GroupNorm):
    """GroupNorm, then SiLU if asked for, by one of `operations`."""

    def __init__(
        self, groups: int, channels: int, eps: float = 1e-5, *, silu: bool = False, operations: Operations = PLAIN
    ):
        super().__init__(groups, channels, eps)
        self.silu = silu
        self.operation = operations.group_norm

    def _normed(self, x: Tensor) -> Tensor:
        return self.operation(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)


class FrameGroupNorm(_GroupNorm):
    """GroupNorm whose statistics are those of one frame: over (C/groups, H, W), never over T. SiLU follows if asked."""

    def forward(self, x: Tensor) -> Tensor:
        return unfold_frames(self._normed(fold_frames(x)), x.shape[2])


class VideoGroupNorm(_GroupNorm):
    """GroupNorm whose statistics are those of one video: over (C/groups, T, H, W). SiLU follows if asked."""

    def forward(self, x: Tensor) -> Tensor:
        # As (B, C, T, H*W) the 4-D channels_last kernel serves; the 5-D one copies to (B, C, T, H, W) order first.
        return from_image(self._normed(to_image(x)), x.shape[3:])


class TemporalConv(Packable, nn.Conv3d):
    """A (3, 1, 1) convolution over frames, zero-padded; weight (out, in, 3, 1, 1) as in the original.

    Run as a (3, 1) Conv2d on the view (B, C, T, H*W): the same sums without the slow 3-D convolution path.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        y = convolve(self, "weight", lambda: self.weight.squeeze(-1), self.bias, to_image(x), padding=(1, 0))
        return from_image(y, x.shape[3:])


class Downsample(nn.Module):
    """Halve height and width, rounded up, by a strided 3x3 convolution. A UNet block, though it needs x alone."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = FrameConv(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return self.conv(x)


def doubled_conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """(N, C, H, W), every pixel twice along height and width, through a 3x3 convolution: (N, out, 2*H, 2*W).

    Three neighbours of a pixel in the finer image are but two pixels of x: each of the four phases of the result is a
    2x2 convolution of x, whose weights are sums of the 3x3's, and x is never enlarged. All four are one convolution
    here, with 16 products a pixel of x instead of 36. (In 16 bit the sums are rounded too: as exact, not equal.)
    """
    if onednn.keeps(layer, x) and onednn.small(layer, x):
        return onednn.by_matrix(layer, "doubled", _doubled_first, lambda: layer.weight, layer.bias, x)
    bias = None if layer.bias is None else layer.bias.repeat(4)
    # (N, H+1, W+1, 2, 2, out), of which y[n, 2*i + a, 2*j + b] = phases[n, i + a, j + b, a, b]: a view, then one copy
    phases = convolve(layer, "phases", lambda: _phase_weights(layer.weight), bias, x, padding=(1, 1))
    phases = phases.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1)).contiguous()
    by_n, by_row, by_column, by_a, by_b, _ = phases.stride()
    size = (x.shape[0], x.shape[2], 2, x.shape[3], 2, phases.shape[5])
    y = _Rearranged.apply(phases, size, (by_n, by_row, by_row + by_a, by_column, by_column + by_b, 1))
    return y.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _doubled_first(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1)


class _Rearranged(torch.autograd.Function):
    """A copy of some elements of a contiguous tensor, each of which is there once: its gradient is one copy, too, where
    PyTorch's own, which cannot know that, adds them up by index."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        ctx.shape, ctx.size, ctx.strides = x.shape, size, strides
        return x.as_strided(size, strides).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        whole = grad.new_zeros(ctx.shape)
        whole.as_strided(ctx.size, ctx.strides).copy_(grad)
        return whole, None, None


def _phase_weights(weight: Tensor) -> Tensor:
    """(out, in, 3, 3) -> (4*out, in, 2, 2): of the phases above left, above right, below left, below right."""
    taps = _two_of_each_phase(_two_of_each_phase(weight.permute(0, 2, 3, 1), 1), 2)  # (out, 2*2, 2*2, in)
    phases = taps.unflatten(2, (2, 2)).unflatten(1, (2, 2)).permute(1, 3, 0, 2, 4, 5)  # (2, 2, out, 2, 2, in)
    return phases.flatten(0, 2).permute(0, 3, 1, 2)


def _two_of_each_phase(weight: Tensor, dim: int) -> Tensor:
    before, here, after = weight.unbind(dim)
    return torch.stack([before, here + after, before + here, after], dim)


class UpsampleConv(FrameConv):
    """Nearest-neighbour to `size`, then a 3x3 convolution on every frame alone."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:  # type: ignore[override]
        frames = fold_frames(x)
        if tuple(size) == (2 * x.shape[3], 2 * x.shape[4]):
            return unfold_frames(doubled_conv(self, frames), x.shape[2])
        return super().forward(unfold_frames(F.interpolate(frames, size=tuple(size), mode="nearest"), x.shape[2]))


class Upsample(nn.Module):
    """Come up to `size` (of the skip that comes next, so any latent size works) by an `UpsampleConv`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = UpsampleConv(channels)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(x, size)


class KeepSize(nn.Module):
    """Stands where an Upsample would, in decoder layers that stay at their resolution."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return x
