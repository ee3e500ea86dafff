"""Dropout whose mask of a clip depends on that clip alone: not on its batch, micro-step or process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Of the clips of the batch at hand. Globals, for backward passes run in other threads; two, for torch.compile would
# compile anew at every change of what it has looked at.
_seeds: tuple[int, ...] = ()
_seeded = False


@contextmanager
def clip_seeds(seeds: Sequence[int]) -> Iterator[None]:
    """Within the context, clip i of a batch has the masks of `seeds[i]`; the backward pass must be within it too."""
    global _seeds, _seeded
    before = _seeds, _seeded
    _seeds, _seeded = tuple(seeds), True
    try:
        yield
    finally:
        _seeds, _seeded = before


class ClipDropout(nn.Dropout):
    """Dropout on (B, C, T, H, W) that draws each clip's mask from the clip's seed and the number of the layer.

    Computed again, as in gradient checkpointing, it is the same. Outside `clip_seeds` it is torch's own.
    """

    number = 0  # of the layer in its model

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p and _seeded):
            return super().forward(x)
        return x * clip_mask(x.detach(), self.p, self.number)


def number_layers(model: nn.Module) -> None:
    """Give every dropout of a model a stream of its own."""
    for number, layer in enumerate(layer for layer in model.modules() if isinstance(layer, ClipDropout)):
        layer.number = number


# An operator of its own, for torch.compile cannot look into generators.
@torch.library.custom_op("vdm::clip_mask", mutates_args=())
def clip_mask(x: Tensor, p: float, number: int) -> Tensor:
    """What to multiply x (B, C, ...) with: 0 with probability p, else 1 / (1 - p).

    It is drawn in the order of channels_last memory, whatever that of x is, which may depend on the batch.
    """
    assert len(_seeds) == len(x), "one seed a clip"
    mask = _empty(x)
    generator = torch.Generator(x.device)
    for clip, seed in zip(mask, _seeds, strict=True):
        generator.manual_seed((seed + 0x9E3779B97F4A7C15 * (number + 1)) % 2**63)
        _draw(clip, p, generator)
    return mask.movedim(-1, 1)


def _draw(mask: Tensor, p: float, generator: torch.Generator) -> None:
    if mask.device.type != "cpu":
        mask.bernoulli_(1.0 - p, generator=generator).div_(1.0 - p)
        return
    # A CPU draws one number after the other: so four of 16 bit at a time, and p as a multiple of 1 / 65536.
    numbers, dropped = torch.empty(-(-mask.numel() // 4), dtype=torch.int64), min(round(p * 2**16), 2**16 - 1)
    drawn = numbers.random_(-(2**63), None, generator=generator).view(torch.int16)[: mask.numel()]
    torch.ge(drawn.view(mask.shape), dropped - 2**15, out=mask)
    mask.mul_(2**16 / (2**16 - dropped))


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], *x.shape[2:], x.shape[1])


@clip_mask.register_fake
def _(x: Tensor, p: float, number: int) -> Tensor:
    return _empty(x).movedim(-1, 1)
