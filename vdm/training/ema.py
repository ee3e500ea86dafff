"""Averaged weights: what is validated, previewed and shipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vdm import dist


class EMA:
    """Exponential moving average, in float32, of what learns of some modules; all else follows the modules.

    The decay warms up as (1 + n) / (10 + n) after n updates, so that the random start is soon forgotten. With `offload`
    the averages are in the CPU's memory, and move there, from a copy of the weights, while the next step is computed.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, decay: float, offload: bool = False):
        self.modules = modules
        self.decay = decay
        self.num_updates = 0
        self.shadow = {
            part: {n: _averaged(p, offload=offload) for n, p in m.named_parameters() if p.requires_grad}
            for part, m in modules.items()
        }
        self._worker = ThreadPoolExecutor(max_workers=1) if offload else None
        self._pending: Future[None] | None = None
        self._copies: list[Tensor] = []  # of the weights, in their own type
        self._exchanged = False  # averages and weights

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for part, module in self.modules.items():
            learning = [p for p in module.parameters() if p.requires_grad]
            yield from zip(learning, self.shadow[part].values(), strict=True)

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards its parameter."""
        self.wait()
        self.num_updates += 1
        weight = 1.0 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        pairs = list(self._pairs())
        if self._worker is None:
            _lerp([average for _, average in pairs], [p.detach() for p, _ in pairs], weight)
            return
        if not self._copies:
            self._copies = [_on_cpu(p.detach()) for p, _ in pairs]
        for copy, (p, _) in zip(self._copies, pairs, strict=True):
            copy.copy_(p.detach(), non_blocking=True)
        arrived = torch.cuda.Event() if any(p.is_cuda for p, _ in pairs) else None
        if arrived is not None:
            arrived.record()
        self._pending = self._worker.submit(_lerp_later, arrived, [a for _, a in pairs], self._copies, weight)

    def wait(self) -> None:
        """Until the averages have arrived where the last update sends them."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def state_dict(self, part: str) -> dict[str, Tensor]:
        """The state dict of a part with the averages in place of its parameters."""
        self.wait()
        own = self.modules[part].state_dict()
        return own if self._exchanged else {**own, **self.shadow[part]}

    def load(self, states: Mapping[str, Mapping[str, Tensor]], *, num_updates: int) -> None:
        """Take over what `state_dict` gave for every part."""
        self.wait()
        self.num_updates = num_updates
        for part, shadow in self.shadow.items():
            for name, average in shadow.items():
                average.copy_(dist.share_of(states[part][name], like=average))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the modules carry the averages, and are in evaluation mode.

        Averages and weights change places, one at a time, so that no second copy of either is made. Only weights in
        bfloat16, which cannot hold an average, are kept beside it.
        """
        self.wait()
        modes = {part: m.training for part, m in self.modules.items()}
        own = [_exchange(p, average) for p, average in self._pairs()]
        self._exchanged = None in own
        try:
            for module in self.modules.values():
                module.eval()
            yield
        finally:
            for (p, average), kept in zip(self._pairs(), own, strict=True):
                _exchange_back(p, average, kept)
            self._exchanged = False
            for part, module in self.modules.items():
                module.train(modes[part])


def _averaged(p: nn.Parameter, *, offload: bool) -> Tensor:
    if not offload:
        return p.detach().float().clone()
    return _on_cpu(p.detach(), dtype=torch.float32).copy_(p.detach())


def _on_cpu(tensor: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Memory of the CPU for a tensor like this, which a GPU can read and write while it works, where there is one."""
    return torch.empty_like(tensor, device="cpu", dtype=dtype or tensor.dtype, pin_memory=tensor.is_cuda)


def _lerp(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    if all(value.dtype == torch.float32 for value in values):
        torch._foreach_lerp_(averages, values, weight)
        return
    for average, value in zip(averages, values, strict=True):  # one at a time: in float32 it takes twice the memory
        average.lerp_(value.float(), weight)


def _lerp_later(arrived: torch.cuda.Event | None, averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    if arrived is not None:
        arrived.synchronize()
    with torch.no_grad():
        _lerp(averages, values, weight)


@torch.no_grad()
def _exchange(p: nn.Parameter, average: Tensor) -> Tensor | None:
    """Put the average into the parameter, and the parameter's value into the average; or else return it."""
    own = p.detach().to(average.device, copy=True)
    p.copy_(average)
    if own.dtype != average.dtype:
        return own
    average.copy_(own)
    return None


@torch.no_grad()
def _exchange_back(p: nn.Parameter, average: Tensor, own: Tensor | None) -> None:
    if own is not None:
        p.copy_(own)
    else:
        _exchange(p, average)
