"""Random streams of clips: every draw is a function of (seed, position in the global stream, purpose)."""

from __future__ import annotations

import numpy as np
import torch

NOISE, POSTERIOR, DROPOUT, FRAME_ORDER = range(4)  # what a clip's random stream is for; the last word of its seed
HELD_OUT = 2**63  # the seed of all draws for held-out clips: that of no run, so that runs can be compared


def clip_seed(seed: int, position: int, purpose: int) -> int:
    """The seed of one clip's random stream for one purpose, below 2**63."""
    state = np.random.SeedSequence([seed, position, purpose]).generate_state(1, np.uint64)
    return int(state[0] >> 1)


def clip_generator(seed: int, position: int, purpose: int) -> torch.Generator:
    """The random stream of one clip for one purpose, on the CPU."""
    return torch.Generator().manual_seed(clip_seed(seed, position, purpose))
