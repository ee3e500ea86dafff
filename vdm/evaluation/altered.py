"""Reference clips made worse in a known way: what a metric makes of them are its ceilings.

A metric that values them as it does the reference is blind to what they lack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from vdm.data.transforms import Frames

NOISE = 50.0  # grey levels: standard deviation of what is added
SEED = 0

Alteration = Callable[[Frames, str], Frames]


def as_it_is(frames: Frames, name: str) -> Frames:
    return frames


def frozen(frames: Frames, name: str) -> Frames:
    """The first frame throughout: pictures without motion."""
    return np.repeat(frames[:1], len(frames), axis=0)


def shuffled(frames: Frames, name: str) -> Frames:
    """The frames in an order drawn for the clip's name, never their own: motion without sense."""
    order = np.arange(len(frames))
    rng = _drawn_for(name)
    while len(frames) > 1 and np.array_equal(order, np.arange(len(frames))):
        order = rng.permutation(len(frames))
    return frames[order]


def noisy(frames: Frames, name: str) -> Frames:
    """With Gaussian noise of NOISE grey levels, drawn for the clip's name: motion in bad pictures."""
    noise = _drawn_for(name).normal(0.0, NOISE, frames.shape)
    return np.clip(np.round(frames + noise), 0, 255).astype(np.uint8)


def _drawn_for(name: str) -> np.random.Generator:
    """Draws that depend on a clip's name alone, whatever its place among others."""
    digest = hashlib.sha256(f"{SEED} {name}".encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


ALTERATIONS: dict[str, Alteration] = {"frozen": frozen, "shuffled": shuffled, "noise": noisy}
