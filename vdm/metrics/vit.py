"""The vision transformer of DINO (ViT-B/16), under the names of its weight file, and its features of frames.

Dosovitskiy et al. 2021 (arXiv:2010.11929), Caron et al. 2021 (DINO, arXiv:2104.14294).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm.errors import UserError
from vdm.metrics.checks import require_frames, unit
from vdm.metrics.clip_pixels import short_side
from vdm.metrics.precision import full_precision
from vdm.weights import fill, open_weights, sha256

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_SHORT_SIDE = 224
_AT_ONCE = 16  # frames that go through the network together


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, N, L, D)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Tokens (B, L, width) -> the same; its norms reduce over the width."""

    def __init__(self, width: int, *, heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Patches(nn.Module):
    def __init__(self, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.proj(x)
        return embedded


class VisionTransformer(nn.Module):
    """Images (B, 3, H, W), normalised, at least one patch each way -> the class token after the last norm (B, width).

    Norms reduce over the width. The positions of a grid other than the trained one are interpolated; pixels beyond the
    last whole patch are not seen.
    """

    def __init__(self, *, width: int = 768, depth: int = 12, heads: int = 12, patch: int = 16, grid: int = 14):
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.patch_embed = _Patches(width, patch)
        self.blocks = nn.ModuleList(Block(width, heads=heads, hidden=4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)  # (B, D, h, w)
        positions = self._positions(patches.shape[-2], patches.shape[-1])
        x = patches.flatten(2).transpose(1, 2) + positions  # (B, h w, D)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x], dim=1)
        for block in self.blocks:
            x = block(x)
        token: Tensor = self.norm(x[:, 0])
        return token

    def _positions(self, rows: int, columns: int) -> Tensor:
        """(1, rows columns, D)."""
        grid = self.pos_embed[:, 1:]
        if (rows, columns) == (self.grid, self.grid):
            return grid
        # DINO scales by (n + 0.1) / grid, so that the size never rounds down, and its coordinates follow that number.
        scale = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
        square = grid.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (1, D, grid, grid)
        resized = F.interpolate(square, scale_factor=scale, mode="bicubic", align_corners=False)
        assert resized.shape[-2:] == (rows, columns), (resized.shape, rows, columns)
        return resized.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Dino:
    """DINO's ViT-B/16, to unit vectors. `load_dino` makes it."""

    net: VisionTransformer
    sha256: str
    device: torch.device

    def frames(self, clips: Tensor) -> Tensor:
        """Clips uint8 RGB (B, T, H, W, 3) -> unit vectors (B, T, 768) float32 on the CPU, one for each frame."""
        require_frames(clips)
        with full_precision(self.device):
            parts = clips.flatten(0, 1).split(_AT_ONCE)  # each (n, H, W, 3)
            features = [self.net(dino_pixels(frames.to(self.device))).cpu() for frames in parts]
        return unit(torch.cat(features)).unflatten(0, clips.shape[:2])


def dino_pixels(frames: Tensor) -> Tensor:
    """frames uint8 (B, H, W, 3) -> (B, 3, h, w) float32 with 224 on the short side, uncropped, normalised.

    As VBench does it: bilinear without antialiasing, rounded to whole grey levels.
    """
    height, width = short_side(frames.shape[1], frames.shape[2], _SHORT_SIDE)
    pixels = frames.permute(0, 3, 1, 2).float()
    if (height, width) != frames.shape[1:3]:
        pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False).round()
    middle, spread = (pixels.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels / 255 - middle) / spread


def load_dino(path: str | Path, *, device: str = "cpu") -> Dino:
    """DINO's `dino_vitbase16_pretrain.pth`. Raises UserError where it is not there, or another file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"DINO weights {path} do not exist; give the file of dino_vitbase16_pretrain.pth")
    net = VisionTransformer()
    weights = open_weights(path)
    if "cls_token" not in weights or weights.specs["cls_token"].shape != net.cls_token.shape:
        raise UserError(f"{path} is not a ViT-B as DINO names it; give the file of dino_vitbase16_pretrain.pth")
    fill(net, weights, source=str(path))
    return Dino(net.eval().requires_grad_(False).to(device), sha256(path), torch.device(device))
