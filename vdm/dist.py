"""The processes that train together, and what they tell each other. A process on its own takes the same path.

`torchrun` starts them and says to each which it is. What they must agree on, be it a number or an answer, goes through
here; gradients and weights go through `vdm.training.parallel`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as process_group
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vdm.errors import Failure, UserError

Anything = TypeVar("Anything")


def rank() -> int:
    """Which of the processes this is; 0 writes the run folder."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def restarts() -> int:
    """How often torchrun has started these processes anew after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def device() -> torch.device:
    """This process's own GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if size() > 1 else torch.device("cuda")


@contextmanager
def together() -> Iterator[None]:
    """Within the context the processes that torchrun started can talk; for one alone there is nothing to do.

    Raises Failure where another process is lost.
    """
    if size() == 1 or process_group.is_initialized():
        yield
        return
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    # What is agreed on lies in the CPU's memory, so that a GPU that is at work does not have to be waited for.
    backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
    try:
        meeting, _, _ = next(process_group.rendezvous("env://"))  # type: ignore[attr-defined]
        # torchrun keeps one store through all restarts, in which the addresses of those that died may still stand.
        meeting = process_group.PrefixStore(f"restart-{restarts()}", meeting)  # type: ignore[attr-defined]
        process_group.init_process_group(backend, store=meeting, rank=rank(), world_size=size())
    except ValueError as error:
        raise UserError(
            f"WORLD_SIZE is {size()}, but the processes cannot meet ({error}); start them with torchrun"
        ) from error
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, process_group.DistError) or "gloo" in str(error).lower():
            raise Failure(f"process {rank()} of {size()} has lost another one, which says why") from error
        raise
    # Not after an error, when others may be gone. And together: that of the one that writes is the last word.
    process_group.barrier()
    process_group.destroy_process_group()


def mean(values: Mapping[str, float]) -> dict[str, float]:
    """The mean over all processes of each number; every process gives the same names."""
    return summed({name: value / size() for name, value in values.items()})


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """The sum over all processes of each number; every process gives the same names."""
    if size() == 1:
        return dict(values)
    numbers = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64)
    process_group.all_reduce(numbers)
    return dict(zip(sorted(values), numbers.tolist(), strict=True))


def any_of(flag: bool) -> bool:
    """Whether any process says so."""
    return summed({"flag": float(flag)})["flag"] > 0


def from_main(value: Anything) -> Anything:
    """What the main process has for a value, which must be one that can be pickled."""
    if size() == 1:
        return value
    box = [value]
    process_group.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Anything) -> list[Anything]:
    """What each process has for a value, in the order of their ranks."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    process_group.all_gather_object(values, value)
    return values


# Tensors that are shared out


def number(tensor: Tensor) -> float:
    """The value of a tensor of one element, which may be sharded."""
    return float(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def whole(tree: Any) -> Any:
    """A state dict whose sharded tensors are put together, in the memory of the CPU; all processes must call it.

    Only the main process gets them; elsewhere None stands in their places.
    """
    if isinstance(tree, DTensor):
        tensor = tree.full_tensor()
        return tensor.cpu() if is_main() else None
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(value) for value in tree] if isinstance(tree, list) else tree


def share_of(tensor: Tensor, *, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, sharded as `like` is; the whole where that is, or is of another shape."""
    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor
    # Every process has read the whole, so none needs to be sent anything.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def unite_flags(module: nn.Module) -> None:
    """Set each flag in the buffers of a module, such as those of the tokens seen, that is set in any process."""
    if size() == 1:
        return
    for buffer in module.buffers():
        if buffer.dtype == torch.bool:
            flags = buffer.to("cpu", torch.uint8)
            process_group.all_reduce(flags, op=process_group.ReduceOp.MAX)
            buffer.copy_(flags)
