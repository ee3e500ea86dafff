"""What moves in a clip, and how much."""

from __future__ import annotations

import torch
from torch import Tensor


def motion_energy(video: Tensor) -> Tensor:
    """Mean absolute difference of consecutive frames, for pixels in [0, 1]: 0 is a still, 1 black and white in turn.

    video (B, 3, T, H, W) float in [-1, 1], what lies outside is clamped -> float32 (B,). A single frame does not move.
    """
    pixels = (video.float().clamp(-1.0, 1.0) + 1.0) / 2.0
    if video.shape[2] < 2:
        return torch.zeros(len(video), device=video.device)
    return pixels.diff(dim=2).abs().flatten(1).mean(1)
