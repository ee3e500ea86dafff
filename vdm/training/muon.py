"""Muon: momentum whose every matrix is made orthogonal before it is applied (Jordan et al. 2024).

A gradient has a few strong directions, and a plain optimizer learns those first; orthogonal updates learn all of them
at one pace. What a caption says of a noisy clip is a weak one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Odd polynomial a x + b x^3 + c x^5 that takes every singular value in (0, 1] to about 1 in five rounds (ibid.).
COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 5
ADAMW_RMS = 0.2  # of an update, so that both kinds of parameter share a learning rate (arXiv 2502.16982, eq. 4)


def orthogonalize(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> the same with all singular values near 1 (0.7 to 1.2): U S V^T becomes about U V^T."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.transpose(1, 2)).transpose(1, 2)
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(ROUNDS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Muon for the weights of linear layers and convolutions, AdamW for all else: embeddings, biases, norms.

    A convolution counts as the matrix (out, in * kernel). `betas[0]` is the momentum (Nesterov's) of both kinds;
    `betas[1]` and `eps` are AdamW's alone. Weight decay is decoupled in both. Each of the `groups` says by a boolean
    `matrices` which kind its parameters are.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None, "gradients are there already"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
            (self._step_matrices if group["matrices"] else self._step_others)(parameters, group)
        return None

    def _step_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        momentum = group["betas"][0]
        for p in parameters:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            gradient = p.grad
            assert gradient is not None
            state["momentum"].lerp_(gradient, 1.0 - momentum)
            update = gradient.lerp(state["momentum"], momentum).flatten(1)
            alike[update.shape[0], update.shape[1]].append((p, update))
        for shape, pairs in alike.items():
            scale = ADAMW_RMS * max(shape) ** 0.5
            for (p, _), update in zip(pairs, orthogonalize(torch.stack([u for _, u in pairs])), strict=True):
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)

    def _step_others(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for p in parameters:
            state = self.state[p]
            if not state:
                state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state["step"] += 1
            state["exp_avg"].lerp_(p.grad, 1.0 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1.0 - beta2)
            count = float(state["step"])
            deviation = (state["exp_avg_sq"] / (1.0 - beta2**count)).sqrt_().add_(group["eps"])
            p.addcdiv_(state["exp_avg"], deviation, value=-group["lr"] / (1.0 - beta1**count))
