"""AdamW in little memory: moments of 32, 16 or 8 bits, for weights in float32 or bfloat16.

Weight by weight, in float32, and then rounded stochastically to what is kept (vdm/training/rounding.py), for of the
libraries none does all that is wanted here: bitsandbytes rounds weights and moments to nearest, so that small updates
are lost; torchao needs a compiler at run time. And a resumed run is to draw the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vdm.training.rounding import dequantise, dynamic_code, quantise, round_to_bf16

States = Literal["fp32", "bf16", "8bit"]
MOMENTS = ("exp_avg", "exp_avg_sq")
SMALL = 4096  # numbers; moments of smaller weights (biases, norms) stay in float32: they matter, and cost nothing
ROUNDING = 3  # what a random stream is for; the last word of its seed


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101), with moments kept as `states` says, and bfloat16 weights rounded stochastically.

    The random bits of a weight's update are a function of (seed, its number, how many updates it had). In 8 bits, the
    second moment is kept as its root, which spans half as many decades. The state of "fp32" is torch.optim.AdamW's.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        states: States = "fp32",
        seed: int = 0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.states, self.seed = states, seed
        self.numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        self.groups = {p: group for group in self.param_groups for p in group["params"]}
        self.codes: dict[tuple[str, torch.device], Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None, "gradients are there already"
        for p in self.numbers:
            if p.grad is not None:
                self.update(p)
        return None

    @torch.no_grad()
    def update(self, p: nn.Parameter, *, scale: float = 1.0) -> None:
        """Move one weight by its gradient times `scale`."""
        assert p.grad is not None
        group, state = self.groups[p], self.state[p]
        if not state:
            state["step"] = torch.zeros(())
        state["step"] += 1
        count = round(float(state["step"]))
        words = [self.seed, self.numbers[p], count, ROUNDING]
        seed = np.random.SeedSequence(words).generate_state(1, np.uint64)
        draws = torch.Generator(p.device).manual_seed(int(seed[0] >> 1))
        gradient = p.grad.float() if scale == 1.0 else p.grad.float() * scale
        (beta1, beta2), rate = group["betas"], group["lr"]

        first, second = (self._read(p, name) for name in MOMENTS)
        first.lerp_(gradient, 1.0 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        weight = p.float()  # p itself where it is float32
        weight.mul_(1.0 - rate * group["weight_decay"])
        deviation = (second / (1.0 - beta2**count)).sqrt_().add_(group["eps"])
        weight.addcdiv_(first, deviation, value=-rate / (1.0 - beta1**count))

        if weight is not p:
            p.copy_(round_to_bf16(weight, draws))
        self._write(p, "exp_avg", first, draws)
        self._write(p, "exp_avg_sq", second, draws)

    def _read(self, p: nn.Parameter, name: str) -> Tensor:
        """A moment in float32: the state itself where that is float32."""
        kept = self.state[p].get(name)
        if kept is None:
            return torch.zeros_like(p, dtype=torch.float32)
        if kept.dtype != torch.uint8:
            return kept.float()
        value = dequantise(kept, self.state[p][f"{name}_scale"], self._code(name, p.device)).view(p.shape)
        return value.square_() if name == "exp_avg_sq" else value

    def _write(self, p: nn.Parameter, name: str, value: Tensor, draws: torch.Generator) -> None:
        state = self.state[p]
        if self.states == "fp32" or p.numel() < SMALL:
            state[name] = value
        elif self.states == "bf16":
            state[name] = round_to_bf16(value, draws)
        else:
            value = value.sqrt() if name == "exp_avg_sq" else value
            state[name], state[f"{name}_scale"] = quantise(value, self._code(name, p.device), draws)

    def _code(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self.codes:
            self.codes[name, device] = dynamic_code(signed=name == "exp_avg").to(device)
        return self.codes[name, device]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, in the types it has; torch's own casts every moment to its weight's."""
        super().load_state_dict({**state_dict, "state": {}})
        self.groups = {p: group for group in self.param_groups for p in group["params"]}
        for p, number in self.numbers.items():
            kept = state_dict["state"].get(number)
            if kept:
                self.state[p] = {
                    name: value.clone() if name == "step" else value.to(p.device, copy=True)
                    for name, value in kept.items()
                }
