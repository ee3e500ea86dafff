"""Noise with more in common than independent numbers have: between the frames of a clip, and within its channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def related_noise(
    noise: Tensor, generator: torch.Generator, *, correlation: float = 0.0, offset: float = 0.0
) -> Tensor:
    """What becomes of a standard normal draw (C, T, h, w) by further draws from `generator`, made on its device.

    Frames: sqrt(a) * shared + sqrt(1 - a) * noise, where `shared` (C, 1, h, w) is one draw for all frames; so numbers
    keep variance 1, and those at one place of two frames have `correlation` a in [0, 1). That is the mixed noise of
    PYoCo (Ge et al. 2023, arXiv 2305.10474), whose alpha^2 is a / (1 - a). Then `offset` s >= 0 adds s times one normal
    number for each channel (Guttenberg 2023, "Diffusion with offset noise"), which makes the variance 1 + s^2.

    Both draws are made where either is wanted, so that neither changes the other; where none is, none is made.
    """
    if not correlation and not offset:
        return noise
    channels, _, height, width = noise.shape
    shared = torch.randn((channels, 1, height, width), generator=generator, device=generator.device).to(noise)
    level = torch.randn((channels, 1, 1, 1), generator=generator, device=generator.device).to(noise)
    return math.sqrt(correlation) * shared + math.sqrt(1.0 - correlation) * noise + offset * level
