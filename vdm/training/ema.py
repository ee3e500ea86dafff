"""Averaged weights: what is validated, previewed and shipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average, in float32, of what learns of some modules; all else follows the modules.

    The decay warms up as (1 + n) / (10 + n) after n updates, so that the random start is soon forgotten.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, decay: float):
        self.modules = modules
        self.decay = decay
        self.num_updates = 0
        self.shadow = {
            part: {n: p.detach().float().clone() for n, p in m.named_parameters() if p.requires_grad}
            for part, m in modules.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards its parameter."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for part, module in self.modules.items():
            averages = list(self.shadow[part].values())
            values = [p.detach().float() for p in _learning(module)]
            torch._foreach_lerp_(averages, values, 1.0 - decay)

    def state_dict(self, part: str) -> dict[str, Tensor]:
        """The state dict of a part with the averages in place of its parameters."""
        return {**self.modules[part].state_dict(), **self.shadow[part]}

    def load(self, states: Mapping[str, Mapping[str, Tensor]], *, num_updates: int) -> None:
        """Take over what `state_dict` gave for every part."""
        self.num_updates = num_updates
        for part, shadow in self.shadow.items():
            for name, average in shadow.items():
                average.copy_(states[part][name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the modules carry the averages, and are in evaluation mode."""
        own = {part: [p.detach().clone() for p in _learning(m)] for part, m in self.modules.items()}
        modes = {part: m.training for part, m in self.modules.items()}
        try:
            for part, module in self.modules.items():
                module.eval()
                _copy(module, list(self.shadow[part].values()))
            yield
        finally:
            for part, module in self.modules.items():
                _copy(module, own[part])
                module.train(modes[part])


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


@torch.no_grad()
def _copy(module: nn.Module, values: list[Tensor]) -> None:
    for parameter, value in zip(_learning(module), values, strict=True):
        parameter.copy_(value)
