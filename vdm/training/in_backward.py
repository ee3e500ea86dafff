"""The optimizer inside the backward pass: a weight moves as soon as its gradient is there, and the gradient is freed.

So no two large gradients are ever there at a time (Lv et al., arXiv 2306.09782), at a price: the gradient's norm is
known only when every weight has moved. A step is therefore clipped by the norm of the step before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vdm.training.adam import AdamW


class InBackward:
    """Within `armed`, a backward pass updates every weight that it reaches; outside it does what it always does.

    A gradient that is not finite moves nothing, and makes the norm of its step so. To know that, the host waits for
    every gradient. The first step, and one after steps without a finite norm alone, are not clipped: Adam's first step
    has the same size whatever its gradient's.
    """

    def __init__(self, optimizer: AdamW, *, max_grad_norm: float):
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        self.last_norm: float | None = None  # the last finite one, before clipping
        self.squares: list[float] | None = None  # of the gradients so far, while armed
        self.norm = math.nan  # of the last backward pass that was armed
        for p in optimizer.numbers:
            p.register_post_accumulate_grad_hook(self._move)

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Within the context gradients move weights; afterwards `norm` is theirs, by which the next step is clipped."""
        self.squares = []
        try:
            yield
            self.norm = math.sqrt(math.fsum(self.squares))  # in whatever order they came
            if math.isfinite(self.norm):
                self.last_norm = self.norm
        finally:
            self.squares = None

    @property
    def scale(self) -> float:
        """What the gradients of this step are multiplied by."""
        return 1.0 if self.last_norm is None else min(1.0, self.max_grad_norm / (self.last_norm + 1e-6))

    def state_dict(self) -> dict[str, float | None]:
        return {"last_norm": self.last_norm}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        self.last_norm = state["last_norm"]

    @torch.no_grad()
    def _move(self, p: Tensor) -> None:
        if self.squares is None:
            return
        assert isinstance(p, nn.Parameter) and p.grad is not None
        norm = float(torch.linalg.vector_norm(p.grad, dtype=torch.float32))
        self.squares.append(norm * norm)
        if math.isfinite(norm):
            self.optimizer.update(p, scale=self.scale)
        p.grad = None
