"""Random streams of clips: every draw is a function of (seed, position in the global stream, purpose)."""

from __future__ import annotations

import numpy as np
import torch

from vdm.training.settings import TrainingConfig

NOISE, POSTERIOR, DROPOUT, FRAME_ORDER = range(4)  # what a clip's random stream is for; the last word of its seed
HELD_OUT = 2**63  # the seed of all draws for held-out clips: that of no run, so that runs can be compared


def clip_seed(seed: int, position: int, purpose: int) -> int:
    """The seed of one clip's random stream for one purpose, below 2**63."""
    state = np.random.SeedSequence([seed, position, purpose]).generate_state(1, np.uint64)
    return int(state[0] >> 1)


def clip_generator(seed: int, position: int, purpose: int) -> torch.Generator:
    """The random stream of one clip for one purpose, on the CPU."""
    return torch.Generator().manual_seed(clip_seed(seed, position, purpose))


def draw_timestep(num_steps: int, draw: torch.Generator, recipe: TrainingConfig) -> int:
    """A time step of training, in [0, num_steps).

    "uniform" is that of DDPM (Ho et al. 2020, algorithm 1); "logit_normal" is sigmoid(n) * num_steps with n normal of
    mean `logit_mean` and deviation `logit_std` (Esser et al. 2024, arXiv 2403.03206, eq. 19), where time 0 is the clip.
    """
    step = int(torch.randint(num_steps, (), generator=draw))
    if recipe.timestep_sampling == "uniform":
        return step
    # The uniform step's place among all, taken as a quantile: whatever is drawn after it stays as it was.
    normal = torch.special.ndtri(torch.tensor((step + 0.5) / num_steps, dtype=torch.float64))
    return min(int((recipe.logit_mean + recipe.logit_std * normal).sigmoid() * num_steps), num_steps - 1)
