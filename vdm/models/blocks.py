"""The UNet's blocks. Every one is called `block(x, emb, context) -> x` on a video (B, C, T, H, W).

`emb` (B, 4*dim) is the SiLU of the time embedding, which all ResBlocks read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vdm.models.dropout import ClipDropout
from vdm.models.layers import (
    FrameConv,
    FrameGroupNorm,
    KeepSize,
    Linear,
    TemporalConv,
    Upsample,
    VideoGroupNorm,
    zero_init,
)
from vdm.models.operations import PLAIN, Operations, add_in_place


class Pass(nn.Module):
    """The block that does nothing: stands where a level has no attention, or an image model no time."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return x


class ResBlock(nn.Module):
    """GN-SiLU-Conv3x3, + Linear(emb), GN-SiLU-Dropout-Conv3x3, residual. Both norms are per frame, eps 1e-5."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        groups: int,
        dropout: float,
        operations: Operations = PLAIN,
    ):
        super().__init__()
        self.norm1 = FrameGroupNorm(groups, in_channels, silu=True, operations=operations)
        self.conv1 = FrameConv(in_channels, out_channels, 3, padding=1)
        self.emb = Linear(emb_dim, out_channels)
        self.norm2 = FrameGroupNorm(groups, out_channels, silu=True, operations=operations)
        self.dropout = ClipDropout(dropout)
        self.conv2 = FrameConv(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut: nn.Module = nn.Identity() if same else FrameConv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = add_in_place(h, self.emb(emb)[:, :, None, None, None])
        h = self.conv2(self.dropout(self.norm2(h)))
        return add_in_place(h, self.shortcut(x))


class TemporalConvBlock(nn.Module):
    """`layers` times GN-SiLU-(Dropout)-Conv(3,1,1), residual. Its norms reduce over frames too, eps 1e-5.

    The last convolution starts at zero: an untrained block changes nothing. The first has no dropout.
    """

    def __init__(self, channels: int, layers: int, groups: int, dropout: float, operations: Operations = PLAIN):
        super().__init__()
        norms = (VideoGroupNorm(groups, channels, silu=True, operations=operations) for _ in range(layers))
        self.norms = nn.ModuleList(norms)
        self.dropouts = nn.ModuleList(ClipDropout(dropout if i else 0.0) for i in range(layers))
        self.convs = nn.ModuleList(TemporalConv(channels, channels) for _ in range(layers))
        zero_init(self.convs[-1])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        h = x
        for norm, dropout, conv in zip(self.norms, self.dropouts, self.convs, strict=True):
            h = conv(dropout(norm(h)))
        return add_in_place(h, x)


class UNetLayer(nn.Module):
    """One step of the UNet: space, time, space with text, time. Any but the first may be `Pass`."""

    def __init__(self, res: nn.Module, temporal_conv: nn.Module, spatial: nn.Module, temporal: nn.Module):
        super().__init__()
        self.res, self.temporal_conv, self.spatial, self.temporal = res, temporal_conv, spatial, temporal

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.res(x, emb, context)
        x = self.temporal_conv(x, emb, context)
        x = self.spatial(x, emb, context)
        return self.temporal(x, emb, context)


class DecoderLayer(nn.Module):
    """Come up to the size of `skip` where the level starts, append skip's channels, apply the layer."""

    def __init__(self, upsample: Upsample | KeepSize, layer: UNetLayer):
        super().__init__()
        self.upsample, self.layer = upsample, layer

    def forward(self, x: Tensor, skip: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.upsample(x, skip.shape[3:])
        return self.layer(torch.cat([x, skip], dim=1), emb, context)
