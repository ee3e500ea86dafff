"""A small classifier of mini-something's actions: features and classes for clips that no Kinetics network knows.

Its features stand behind `fvd_toy` and `kvd_toy`, its classes behind `is_toy`, never behind FVD or IS: numbers of other
weights compare with nothing. `benchmarks/toy_classifier.py` makes the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm.errors import UserError
from vdm.vocabulary import ACTIONS
from vdm.weights import fill, open_weights, sha256

SIZE = 64  # pixels a side
FEATURES = 128
SHIPPED = Path(__file__).parents[1] / "assets" / "toy_classifier.safetensors"
SHIPPED_SHA256 = "6967334925d2996f3e9da9334885edfd00a22a2c04be996162f2507dc468d17c"

_STEM = ((3, 48, 7, 4), (48, 64, 3, 2), (64, 96, 3, 2))  # channels in and out, kernel, stride: 64 pixels to 4
_DILATIONS = (1, 2, 4)  # in frames: with two convolutions each, a feature sees 14 frames either way


class Judged(NamedTuple):
    """What the classifier says of clips."""

    logits: Tensor  # (B,16) float32, in the order of vdm.vocabulary.ACTIONS
    features: Tensor  # (B,128) float32, what the logits are a linear function of


class ToyClassifier(nn.Module):
    """uint8 clips (B,T,64,64,3) -> `Judged`: convolutions of each frame alone, then of its features along time.

    Trained on whole actions of 16 frames; any T is taken, but the further from that, the worse it judges. Nothing is
    averaged over positions, and over time only at the end, so that left and right, before and after count. Norms are
    batch norms: once in eval mode, each clip is judged alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*[_layer(*sizes) for sizes in _STEM], nn.Flatten())
        self.embed = nn.Linear(96 * 4 * 4, FEATURES)
        self.temporal = nn.Sequential(*[_TemporalBlock(FEATURES, dilation=dilation) for dilation in _DILATIONS])
        self.head = nn.Linear(FEATURES, len(ACTIONS))

    def forward(self, clips: Tensor) -> Judged:
        """Raises ValueError for other shapes and dtypes."""
        if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[2:] != (SIZE, SIZE, 3) or clips.shape[1] < 1:
            raise ValueError(f"clips must be uint8 (B,T,{SIZE},{SIZE},3), not {clips.dtype} {tuple(clips.shape)}")
        frames = clips.flatten(0, 1).permute(0, 3, 1, 2)  # (B*T,3,64,64), channels last in memory
        x = self.embed(self.stem(frames.float() / 127.5 - 1.0))  # (B*T,128)
        x = x.unflatten(0, clips.shape[:2]).transpose(1, 2)  # (B,128,T)
        features = self.temporal(x).mean(2)
        return Judged(self.head(features), features)


def _layer(channels: int, out: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


class _TemporalBlock(nn.Module):
    """(B,C,T) -> (B,C,T), not negative: two convolutions over every `dilation`-th frame beside the identity."""

    def __init__(self, channels: int, *, dilation: int):
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False) for _ in range(2)
        )
        self.norm1, self.norm2 = nn.BatchNorm1d(channels), nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


def load_toy_classifier(path: Path = SHIPPED, *, digest: str = SHIPPED_SHA256) -> ToyClassifier:
    """The trained classifier in eval mode, float32, on the CPU.

    Raises UserError where the file is missing, or is not the one whose SHA-256 is `digest`.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; install vdm anew, or make it by `python benchmarks/toy_classifier.py`")
    if (found := sha256(path)) != digest:
        raise UserError(f"{path} has SHA-256 {found[:12]}..., not {digest[:12]}...; restore the file that vdm ships")
    net = ToyClassifier()
    fill(net, open_weights(path), source=str(path))
    return net.eval().requires_grad_(False)
