"""Which operations a network runs on: PyTorch's own, or the fused ones of `kernels`. Decided once, when it is built."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vdm.errors import UserError
from vdm.models.attention import attend_frames, geglu

AttentionKernel = Literal["auto", "sdpa", "triton"]
CAPABILITY = (8, 0)  # of the oldest GPUs that the kernels are compiled for: A100


class Operations(NamedTuple):
    """`attend_frames`: packed q, k, v (B, T, P, 3, N, D) -> (B, T, P, N, D); `geglu`: (..., 2W) -> (..., W)."""

    attend_frames: Callable[[Tensor], Tensor]
    geglu: Callable[[Tensor], Tensor]


PLAIN = Operations(attend_frames, geglu)


def choose(kernel: AttentionKernel) -> Operations:
    """`auto` is triton where there is a GPU for it, else sdpa. Raises UserError where `triton` cannot run."""
    if kernel == "sdpa":
        return PLAIN
    if kernel == "auto":
        if clash := _other_package():
            _warn(f"model.attention_kernel=auto means sdpa here, for {clash}")
        if _why_not() or _interpreting():
            return PLAIN
    elif reason := _why_not():
        raise _refused(reason)

    from kernels.geglu import geglu as fused_geglu
    from kernels.temporal_attention import temporal_attention, why_not

    attention = _attend_frames_if_it_can if kernel == "auto" else _attend_frames_or_refuse
    if kernel == "auto" and (problem := _problem_of(temporal_attention, fused_geglu)):
        _warn(f"model.attention_kernel=auto means sdpa here, for {problem}")
        return PLAIN
    return Operations(partial(attention, temporal_attention, why_not), partial(_geglu_if_it_can, fused_geglu))


@cache
def _problem_of(attend: Callable[[Tensor], Tensor], gate: Callable[[Tensor], Tensor]) -> str | None:
    """What is wrong with fused operations on the GPU at hand, by one small try of each; nobody asked for them."""
    return _difference("attention", attend, attend_frames, (2, 5, 3, 3, 2, 64)) or _difference(
        "geglu", gate, geglu, (7, 96)
    )


def _difference(
    name: str, ours: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> str | None:
    """Where an operation and its gradient differ from PyTorch's by more than the rounding of bfloat16, if they do."""
    draw = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    try:
        given = torch.randn(shape, generator=draw, device="cpu").to(device, torch.bfloat16)
        for operation in (ours, plain):
            x = given.clone().requires_grad_()
            y = operation(x)
            (y.float() * torch.arange(1, y.shape[-1] + 1, device=device)).mean().backward()
            results.append((y.detach().float(), x.grad.float()))  # type: ignore[union-attr]
    except Exception as error:  # of a compiler or a driver: whatever it is, PyTorch's own operation does without
        return f"the fused {name} fails ({type(error).__name__}: {str(error).splitlines()[0]})"
    for left, right in zip(*results, strict=True):
        if float((left - right).norm()) > 0.02 * float(right.norm()):
            return f"the fused {name} computes something else than PyTorch's"
    return None


def _why_not() -> str | None:
    """Why the kernels cannot run here, if they cannot."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if clash := _other_package():
        return clash
    if _interpreting():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability() < CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None


def _interpreting() -> bool:
    """Whether Triton runs kernels on the CPU, which is for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _other_package() -> str | None:
    """What is wrong if `import kernels` does not find ours."""
    spec = importlib.util.find_spec("kernels")
    if spec is None:
        return "the package kernels, which is part of vdm, is not found"
    folders = list(spec.submodule_search_locations or ())
    if any((Path(folder) / "temporal_attention.py").is_file() for folder in folders):
        return None
    found = next(iter(folders), spec.origin)
    return f"another package named kernels, such as Hugging Face's, is found before vdm's: {found}"


@cache
def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _refused(reason: str) -> UserError:
    return UserError(f"model.attention_kernel is triton, but {reason}; set it to auto or sdpa")


WhyNot = Callable[[Tensor], str | None]


def _attend_frames_if_it_can(kernel: Callable[[Tensor], Tensor], why_not: WhyNot, qkv: Tensor) -> Tensor:
    return attend_frames(qkv) if why_not(qkv) else kernel(qkv)


def _attend_frames_or_refuse(kernel: Callable[[Tensor], Tensor], why_not: WhyNot, qkv: Tensor) -> Tensor:
    if reason := why_not(qkv):
        raise _refused(reason)
    return kernel(qkv)


def _geglu_if_it_can(kernel: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return kernel(x) if x.is_cuda or _interpreting() else geglu(x)
