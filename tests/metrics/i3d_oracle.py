"""I3D written a second time, otherwise: a function of a state dict under hassony2's names, with SAME padding by sizes.

`weights` draws such a state dict. Nothing here is shared with the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# What each block puts out, and what it narrows to inside: branch_0; branch_1; branch_2; branch_3.
BLOCKS = {
    "3b": (64, (96, 128), (16, 32), 32),
    "3c": (128, (128, 192), (32, 96), 64),
    "4b": (192, (96, 208), (16, 48), 64),
    "4c": (160, (112, 224), (24, 64), 64),
    "4d": (128, (128, 256), (24, 64), 64),
    "4e": (112, (144, 288), (32, 64), 64),
    "4f": (256, (160, 320), (32, 128), 128),
    "5b": (256, (160, 320), (32, 128), 128),
    "5c": (384, (192, 384), (48, 128), 128),
}
COUNTER = "num_batches_tracked"


def units() -> dict[str, tuple[int, int, int]]:
    """Of each convolution with a norm: channels in, channels out, kernel."""
    found = {"conv3d_1a_7x7": (3, 64, 7), "conv3d_2b_1x1": (64, 64, 1), "conv3d_2c_3x3": (64, 192, 3)}
    width = 192
    for block, (one, (narrow, two), (narrower, three), four) in BLOCKS.items():
        found[f"mixed_{block}.branch_0"] = width, one, 1
        found[f"mixed_{block}.branch_1.0"] = width, narrow, 1
        found[f"mixed_{block}.branch_1.1"] = narrow, two, 3
        found[f"mixed_{block}.branch_2.0"] = width, narrower, 1
        found[f"mixed_{block}.branch_2.1"] = narrower, three, 3
        found[f"mixed_{block}.branch_3.1"] = width, four, 1
        width = one + two + three + four
    return found


def weights(*, seed: int = 0, classes: int = 400) -> dict[str, Tensor]:
    """float32 tensors by hassony2's names, so drawn that numbers neither die out nor grow on their way."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    state = {}
    for name, (channels, width, kernel) in units().items():
        state[f"{name}.conv3d.weight"] = normal(
            width, channels, kernel, kernel, kernel, scale=math.sqrt(2 / (channels * kernel**3))
        )
        state[f"{name}.batch3d.weight"] = 1 + normal(width, scale=0.1)
        state[f"{name}.batch3d.bias"] = normal(width, scale=0.2)
        state[f"{name}.batch3d.running_mean"] = normal(width, scale=0.2)
        state[f"{name}.batch3d.running_var"] = 0.5 + torch.rand(width, generator=generator)
        state[f"{name}.batch3d.{COUNTER}"] = torch.tensor(0)
    state["conv3d_0c_1x1.conv3d.weight"] = normal(classes, 1024, 1, 1, 1, scale=1 / 32)
    state["conv3d_0c_1x1.conv3d.bias"] = normal(classes, scale=0.1)
    return state


def piergiaj(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under piergiaj's names."""
    letters = {"0": "b0", "1.0": "b1a", "1.1": "b1b", "2.0": "b2a", "2.1": "b2b", "3.1": "b3b"}
    renamed = {}
    for name in units():
        block, _, branch = name.partition(".branch_")
        new = f"M{block[1:]}.{letters[branch]}" if branch else f"C{name[1:]}"
        for leaf in ("conv3d.weight", *(f"batch3d.{part}" for part in
                     ("weight", "bias", "running_mean", "running_var", COUNTER))):  # fmt: skip
            renamed[f"{new}.{leaf.replace('batch3d', 'bn')}"] = state[f"{name}.{leaf}"]
    for part in ("weight", "bias"):
        renamed[f"logits.conv3d.{part}"] = state[f"conv3d_0c_1x1.conv3d.{part}"]
    return renamed


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, so that there are ceil(size / stride) windows."""
    missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return missing // 2, missing - missing // 2


def _padded(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], value: float) -> Tensor:
    sides = [_same(size, k, s) for size, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    (front, back), (top, bottom), (left, right) = sides
    return F.pad(x, (left, right, top, bottom, front, back), value=value)


def maps(state: Mapping[str, Tensor], video: Tensor, *, eps: float = 1e-3) -> Tensor:
    """(B,3,T,H,W) -> (B,1024,t,h,w)."""

    def unit(name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = state[f"{name}.conv3d.weight"]
        x = _padded(x, tuple(kernel.shape[2:]), (stride,) * 3, 0.0)
        x = F.conv3d(x, kernel, stride=stride)
        mean, var, gain, bias = (
            state[f"{name}.batch3d.{part}"][:, None, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + eps).sqrt() * gain + bias).clamp_min(0)

    def pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        return F.max_pool3d(_padded(x, kernel, stride, -math.inf), kernel, stride)

    def mixed(block: str, x: Tensor) -> Tensor:
        branch: Callable[[int], str] = lambda index: f"mixed_{block}.branch_{index}"  # noqa: E731
        two = unit(f"{branch(1)}.1", unit(f"{branch(1)}.0", x))
        three = unit(f"{branch(2)}.1", unit(f"{branch(2)}.0", x))
        four = unit(f"{branch(3)}.1", pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([unit(branch(0), x), two, three, four], 1)

    x = unit("conv3d_1a_7x7", video, stride=2)
    x = pool(x, (1, 3, 3), (1, 2, 2))
    x = unit("conv3d_2c_3x3", unit("conv3d_2b_1x1", x))
    x = pool(x, (1, 3, 3), (1, 2, 2))
    for block in BLOCKS:
        if block == "4b":
            x = pool(x, (3, 3, 3), (2, 2, 2))
        if block == "5b":
            x = pool(x, (2, 2, 2), (2, 2, 2))
        x = mixed(block, x)
    return x


def head(state: Mapping[str, Tensor], maps: Tensor) -> Tensor:
    """(B,1024,t,7,7) -> logits (B,400): the mean over each pair of steps, then over these."""
    steps = (maps[:, :, 1:] + maps[:, :, :-1]).mean((3, 4)) / 2
    kernel, bias = (state[f"conv3d_0c_1x1.conv3d.{part}"] for part in ("weight", "bias"))
    return (torch.einsum("bct,kc->bkt", steps, kernel.flatten(1)) + bias[:, None]).mean(2)
