"""CUDA graphs of networks: one call launches thousands of kernels, for which small batches and models wait."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vdm.errors import UserError


class Replayed:
    """Computes on a GPU what `call` does, without gradients, by replaying the kernels of its first call.

    Kernels are recorded anew when a shape or type changes. What is recorded reads the weights where they lie: they may
    change in place, but must not move. The memory of one call stays taken for as long as this object lives.
    """

    def __init__(self, call: Callable[..., Tensor], device: torch.device):
        assert device.type == "cuda", f"graphs are of GPUs, and this is {device}"
        self.call, self.device = call, device
        self.signature: tuple[object, ...] | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        signature = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
        with torch.cuda.device(self.device):  # whose streams record and replay; another may be the current one
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
        with _casts_recorded(), torch.cuda.graph(self.graph, stream=side):  # its own would be of the first device used
            self.result = self.call(*self.places)


def replay_in_training(module: nn.Module) -> None:
    """From its first call with gradients on, a module on a GPU replays that call's kernels, and those of its backward
    pass, for all tensors of the same shapes; its weights may change in place. Other calls are made as ever.

    The result and the gradients lie where the next replay writes: they must be used before, and not added up.
    Raises UserError without a GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("training.cuda_graph needs a GPU, and there is none; set it to false")
    plain: Callable[..., Tensor] = module.forward
    replay, recorded = plain, None

    def forward(*tensors: Tensor) -> Tensor:
        nonlocal replay, recorded
        if not (module.training and torch.is_grad_enabled()):
            return plain(*tensors)
        signature = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors)
        if recorded is None:
            module.forward = plain
            try:
                _record_training(module, tensors)
                replay = module.forward
            finally:
                module.forward = forward
            recorded = signature
        return replay(*tensors) if signature == recorded else plain(*tensors)

    module.forward = forward


def _record_training(module: nn.Module, tensors: tuple[Tensor, ...]) -> None:
    """Give a module the forward that replays, as PyTorch makes it of tensors like these."""
    likes = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors)
    with _casts_recorded():
        torch.cuda.make_graphed_callables(module, likes, allow_unused_input=True)


def _casts_recorded() -> torch.autocast:
    """The autocast of now, in which weights are cast within a graph, at each replay, and not once before it."""
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False)
