"""What a computation would hold in memory, and how much it would compute: run for real, on tensors without numbers.

The code that runs is the code itself; nothing is estimated but what happens inside a kernel, which is left out.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from vdm.models import attention, onednn, operations

OTHER = "activations"  # all that nobody has marked: temporaries too
_aten = torch.ops.aten
_FUSED = _aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward


class Ledger(TorchDispatchMode):
    """Within the context every storage of memory is entered when it is made and struck out when it is freed.

    `held` is bytes now by kind, `peak` the same at the moment of the largest sum since `watch`, `flops` the operations
    of products, convolutions and attention, a multiply-add being two. Who asks for a number is told 0.75, 1 or true.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.flops = 0
        self._now, self._most = 0, -1
        self._live: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def watch(self) -> None:
        """Forget the peak so far."""
        self._most = -1
        self._look()

    def mark(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say of what kind some tensors are."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._live:
                reference, size, before = self._live[key]
                self.held[before] -= size
                self.held[kind] += size
                self._live[key] = reference, size, kind

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _aten._local_scalar_dense.default:
            return _one(args[0].dtype)
        result = func(*args, **(kwargs or {}))
        self.flops += _count(func, args, kwargs or {}, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor)
        return result

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            self._live[key] = weakref.ref(storage, lambda _: self._strike(key)), size, OTHER
            self.held[OTHER] += size
            self._now += size
            self._look()

    def _strike(self, key: int) -> None:
        _, size, kind = self._live.pop(key)
        self.held[kind] -= size
        self._now -= size

    def _look(self) -> None:
        if self._now > self._most:
            self._most, self.peak = self._now, +self.held


def _one(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 0.75 if dtype.is_floating_point else 1


def _count(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    packet = getattr(func, "_overloadpacket", None)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    if packet is _FUSED:
        return sdpa_flop_count(*(one.shape for one in args[:3]))
    if packet is _FUSED_BACKWARD:
        return sdpa_backward_flop_count(*(one.shape for one in args[:4]))
    return 0


def _fused(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention that keeps no (L, S) matrix: CUDA's at any length, the CPU's where it is let."""

    def fused(*args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return attend(*args, **kwargs)

    return fused


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What CUDA's autocast does to a norm, and the CPU's does not."""

    def wide(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(one.float() if isinstance(one, Tensor) else one for one in args)
            kwargs = {name: one.float() if isinstance(one, Tensor) else one for name, one in kwargs.items()}
        return function(*args, **kwargs)

    return wide


def _choices_of_cuda() -> dict[str, Callable[..., Tensor]]:
    """Functions of torch.nn.functional after which CUDA holds other tensors than the CPU."""
    norms = ("layer_norm", "group_norm", "softmax", "log_softmax")
    fused = {"scaled_dot_product_attention": _fused(F.scaled_dot_product_attention)}
    return {**fused, **{name: _in_float32(getattr(F, name)) for name in norms}}


@contextmanager
def imagined(*, cuda: bool) -> Iterator[Ledger]:
    """Within the context tensors have shapes and strides but no memory, on a device that says it is the CPU.

    `cuda` makes the choices of kernels and types those of a GPU.
    """
    # Module.to would swap parameters, which FakeTensorMode refers to weakly, so that a swap is refused.
    # In a backward pass that computes the forward again a TorchFunctionMode is not active: hence by name.
    with (
        _replaced(torch.utils, {"swap_tensors": _overwrite}),
        _replaced(F, _choices_of_cuda() if cuda else {}),
        # Pieces that fit caches, gates within a product, scores and sums of channels written out: all that is a CPU's.
        _replaced(attention, dict.fromkeys(("CACHED", "TOKENS"), sys.maxsize) if cuda else {}),
        _replaced(onednn, {"ONEDNN": False} if cuda else {}),
        _replaced(operations, {"SHORT": 0, "VECTOR": 0} if cuda else {}),
        FakeTensorMode(),
        Ledger() as ledger,
    ):
        yield ledger


@contextmanager
def _replaced(module: Any, others: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in others}
    try:
        for name, other in others.items():
            setattr(module, name, other)
        yield
    finally:
        for name, one in before.items():
            setattr(module, name, one)


def _overwrite(old: Tensor, new: Tensor) -> None:
    old.data = new.data


def tensors_in(held: object) -> Iterator[Tensor]:
    """All tensors in dictionaries, lists and tuples within one another."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping):
        for inner in held.values():
            yield from tensors_in(inner)
    elif isinstance(held, list | tuple):
        for inner in held:
            yield from tensors_in(inner)
