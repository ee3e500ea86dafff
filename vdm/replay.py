"""A CUDA graph of a network: its thousands of kernels are launched by one call, for which small batches wait."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vdm.errors import UserError


class Replayed:
    """Computes what `call` does, without gradients, by replaying the kernels of its first call.

    Kernels are recorded anew when a shape or type changes. What is recorded reads the weights where they lie: they may
    change in place, but must not move. The memory of one call stays taken for as long as this object lives.
    Raises UserError without a GPU.
    """

    def __init__(self, call: Callable[..., Tensor], device: torch.device):
        if device.type != "cuda":
            raise UserError(f"sampling.cuda_graph needs a GPU, and this is {device}; set it to false")
        self.call = call
        self.signature: tuple[object, ...] | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        signature = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
        if signature != self.signature:
            self._record(tensors)
            self.signature = signature
        for place, tensor in zip(self.places, tensors, strict=True):
            place.copy_(tensor)
        self.graph.replay()
        return self.result.clone()  # which the next replay writes over

    @torch.no_grad()
    def _record(self, tensors: tuple[Tensor, ...]) -> None:
        self.signature = None  # should this fail, what is half recorded is not replayed
        self.places = [tensor.clone() for tensor in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # once as it is: libraries choose and allocate what no graph can record
            self.call(*self.places)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = self.call(*self.places)
