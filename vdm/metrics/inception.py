"""Inception score: are clips clearly of one class each, and of all classes together."""

from __future__ import annotations

import torch
from torch import Tensor

from vdm.errors import UserError


def inception_score(logits: Tensor, *, splits: int = 1, seed: int | None = None) -> tuple[float, float]:
    """exp(mean_i KL(p_i || mean p)) with p = softmax of logits (N, K) float32 or float64 -> (mean, std) over splits.

    Salimans et al. 2016, eq. 1, in float64. It lies in 1 to min(K, N / splits), and is too low by about 1/N: only
    scores of equal N and splits compare. Splits are contiguous, after a shuffle where a seed is given; std is that of
    the population, 0 for one split. A logit of -inf is a probability of 0, so of probabilities p give p.log().
    Raises UserError for NaN, infinity or fewer rows than splits, ValueError for shapes and dtypes.
    """
    if logits.ndim != 2 or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits are (N, K) float32 or float64, not {tuple(logits.shape)} {logits.dtype}")
    if not 1 <= splits <= len(logits):
        raise UserError(
            f"{len(logits)} clips cannot be split in {splits}; there must be 1 split or more, each of a clip"
        )
    p = logits.detach().to("cpu", torch.float64).softmax(1)
    if not p.isfinite().all():
        raise UserError("logits hold NaN or infinity; look at the clips, and at the weights that made the logits")
    if seed is not None:
        p = p[torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))]
    scores = torch.stack([_score(part) for part in p.tensor_split(splits)])
    return scores.mean().item(), scores.std(correction=0).item()


def _score(p: Tensor) -> Tensor:
    """Of probabilities (N, K); xlogy, since 0 log 0 is 0 here."""
    return (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean().exp()
