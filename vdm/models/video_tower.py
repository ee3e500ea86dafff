"""The other half of a CLIP model (arXiv 2103.00020): clips beside captions, so that a text tower can be pretrained."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, GROUPS, GRID = 64, 8, 2


class VideoTower(nn.Module):
    """Latents (B, C, T, h, w) -> embedding (B, embed_dim), at any T, h and w.

    Convolutions over space and time, then means over a grid of 2 x 2 x 2 cells, which what, where and when survive.
    """

    def __init__(self, in_channels: int, embed_dim: int):
        super().__init__()
        strides = {(in_channels, WIDTH): (1, 1, 1), (WIDTH, WIDTH): (1, 2, 2), (WIDTH, 2 * WIDTH): (2, 2, 2)}
        layers: list[nn.Module] = []
        for (before, after), stride in strides.items():
            conv = nn.Conv3d(before, after, 3, stride=stride, padding=1)
            layers += [conv, nn.GroupNorm(GROUPS, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv3d(2 * WIDTH, 2 * WIDTH, 3, padding=1), nn.SiLU())
        self.pool = nn.AdaptiveAvgPool3d(GRID)
        self.out = nn.Linear(2 * WIDTH * GRID**3, embed_dim)

    def forward(self, latents: Tensor) -> Tensor:
        return self.out(self.pool(self.layers(latents)).flatten(1))


class ContrastiveHead(nn.Module):
    """How well each clip of a batch and each caption fit: latents (B, C, T, h, w), pooled text (B, D) -> logits (B, B).

    Row i is clip i. Cosines of the two embeddings, divided by a learned temperature, in float32.
    """

    def __init__(self, in_channels: int, text_width: int):
        super().__init__()
        self.video_tower = VideoTower(in_channels, text_width)
        self.text_projection = nn.Linear(text_width, text_width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start

    def forward(self, latents: Tensor, pooled: Tensor) -> Tensor:
        video, text = self.video_tower(latents), self.text_projection(pooled)
        with torch.autocast(latents.device.type, enabled=False):
            cosines = F.normalize(video.float(), dim=1) @ F.normalize(text.float(), dim=1).T
        return self.logit_scale.exp().clamp(max=100.0) * cosines  # CLIP's limit
