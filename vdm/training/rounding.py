"""Numbers of few bits that lose nothing on average: stochastic rounding to bfloat16, and to a table of 8-bit values.

An update that is smaller than half a step of the format is lost, every time, where one rounds to nearest: a moving
average with decay 0.999 moves by a thousandth, and a step of bfloat16 is four. Rounded up or down with the probability
that makes the mean right, it arrives in one of many steps instead (Gupta et al., arXiv 1502.02551).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # values that share a scale
SLICE = 2**22  # values that are rounded at a time
TINY = torch.finfo(torch.float32).tiny


def round_to_bf16(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16 of the same shape: one of the two neighbours, so that the mean is x; finite x only.

    bfloat16 is the upper half of float32, so adding a random lower half carries with just the right probability.
    """
    noise = torch.empty_like(x, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def dynamic_code(*, signed: bool) -> Tensor:
    """The 255 or 256 values in [-1, 1] or [0, 1] that 8 bits stand for, rising (Dettmers et al., arXiv 2110.02861).

    Seven decades below 1; the higher the decade, the more of the bits are left for the place in it. 0 and the ends are
    exact.
    """
    values = [torch.ones(1), torch.zeros(1)]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float64)
        values.append(((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).float())
    if not signed:
        return torch.cat(values).sort().values
    values[-1][-1] = 1.0  # in place of one just below, so that both ends can have it
    positive = torch.cat(values[2:])
    return torch.cat([-positive, torch.zeros(1), positive]).sort().values


def quantise(x: Tensor, code: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """float32 -> indices into `code`, uint8 (n,), and the largest magnitude of every block of 256, float32.

    Rounded stochastically; but what is above 0 in a code without a sign stays above 0, for it is to be divided by.
    """
    if x.numel() > SLICE:  # what is needed for a moment is a dozen times as large
        pieces = [quantise(piece, code, generator) for piece in x.reshape(-1).split(SLICE)]
        return torch.cat([index for index, _ in pieces]), torch.cat([scale for _, scale in pieces])
    values = F.pad(x.reshape(-1), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    scale = values.abs().amax(1)
    values = values / scale.clamp(min=TINY)[:, None]
    above = torch.bucketize(values, code, out_int32=True).clamp_(1, len(code) - 1)
    low, high = code[above - 1], code[above]
    chance = torch.rand(values.shape, generator=generator, device=x.device)
    index = above - 1 + (chance * (high - low) < values - low)
    if code[0] == 0.0:
        index = torch.maximum(index, (values > 0.0).int())
    return index.to(torch.uint8).view(-1)[: x.numel()], scale


def dequantise(index: Tensor, scale: Tensor, code: Tensor) -> Tensor:
    """What `quantise` gave -> float32 (n,)."""
    padded = F.pad(index, (0, -index.numel() % BLOCK)).view(-1, BLOCK)
    return (code[padded.int()] * scale[:, None]).view(-1)[: index.numel()]
