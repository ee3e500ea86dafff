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
from torch.optim.adamw import adamw

# Odd polynomial a x + b x^3 + c x^5 that takes every singular value in (0, 1] to about 1 in five rounds (ibid.).
COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 5
ADAMW_RMS = 0.2  # of an update, so that both kinds of parameter share a learning rate (arXiv 2502.16982, eq. 4)


def orthogonalize(matrices: Tensor, *, within: torch.dtype | None = None) -> Tensor:
    """(N, rows, columns) -> the same with all singular values near 1 (0.7 to 1.2): U S V^T becomes about U V^T.

    All but the scaling is computed in `within`: bfloat16, as its authors do, is twice as fast on a CPU that has it.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.transpose(1, 2), within=within).transpose(1, 2)
    a, b, c = COEFFICIENTS
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-12)).to(within)
    for _ in range(ROUNDS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for the weights of linear layers and convolutions, AdamW for all else: embeddings, biases, norms.

    A convolution counts as the matrix (out, in * kernel). `betas[0]` is the momentum (Nesterov's) of both kinds;
    `betas[1]` and `eps` are AdamW's alone. Weight decay is decoupled in both. Each of the `groups` says by a boolean
    `matrices` which kind its parameters are. Matrices are made orthogonal in numbers of the type `within`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        within: torch.dtype | None = None,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.within = within

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None, "gradients are there already"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            (self._step_matrices if group["matrices"] else self._step_others)(parameters, group)
        return None

    def _step_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        torch._foreach_mul_(list[Tensor](parameters), 1.0 - group["lr"] * group["weight_decay"])
        alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        momentum, gradients = group["betas"][0], _gradients(parameters)
        momenta = [self._state(p, "momentum")["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1.0 - momentum)
        for p, update in zip(parameters, torch._foreach_lerp(gradients, momenta, momentum), strict=True):
            update = update.flatten(1)
            alike[update.shape[0], update.shape[1]].append((p, update))
        for shape, pairs in alike.items():
            scale = ADAMW_RMS * max(shape) ** 0.5
            updates = orthogonalize(torch.stack([update for _, update in pairs]), within=self.within)
            moved = [update.reshape(p.shape) for (p, _), update in zip(pairs, updates, strict=True)]
            torch._foreach_add_([p for p, _ in pairs], moved, alpha=-group["lr"] * scale)

    def _step_others(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        states = [self._state(p, "exp_avg", "exp_avg_sq") for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            state["step"] = state.get("step", torch.zeros(())).to(p.device)  # where the fused kernel counts it up
        means, squares, counts = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        (beta1, beta2), rate = group["betas"], group["lr"]
        how = {"beta1": beta1, "beta2": beta2, "lr": rate, "weight_decay": group["weight_decay"], "eps": group["eps"]}
        adamw(list(parameters), _gradients(parameters), means, squares, [], counts, fused=True, amsgrad=False,
              maximize=False, **how)  # fmt: skip

    def _state(self, p: nn.Parameter, *moments: str) -> dict[str, Tensor]:
        """What is kept of a parameter; its moments begin at zero."""
        state = self.state[p]
        for name in moments:
            if name not in state:
                state[name] = torch.zeros_like(p)
        return state


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
