"""Which operations a network runs on: PyTorch's own, or the fused ones of `kernels`. Decided once, when it is built."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vdm.errors import UserError
from vdm.models import operations as plain
from vdm.models.operations import PLAIN, Operations

AttentionKernel = Literal["auto", "sdpa", "triton"]
CAPABILITY = (8, 0)  # of the oldest GPUs that the kernels are compiled for: A100


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

    try:
        ours = _kernels(attention=_attend_frames_if_it_can if kernel == "auto" else _attend_frames_or_refuse)
    except Exception as error:  # a Triton that is there and cannot be imported
        problem: str | None = f"triton cannot be used ({type(error).__name__}: {str(error).splitlines()[:1]})"
        if kernel == "triton":
            raise _refused(str(problem)) from error
    else:
        problem = _problem_of(ours) if kernel == "auto" else None
    if problem:
        _warn(f"model.attention_kernel=auto means sdpa here, for {problem}")
        return PLAIN
    return ours


@cache
def _kernels(attention: Callable[..., Tensor]) -> Operations:
    from kernels import add_layer_norm, geglu, group_norm, temporal_attention

    return Operations(
        partial(attention, temporal_attention.temporal_attention, temporal_attention.why_not),
        partial(_geglu_if_on_gpu, geglu.geglu),
        partial(_group_norm_if_it_can, group_norm.group_norm, group_norm.why_not),
        partial(_add_layer_norm_if_it_can, add_layer_norm.add_layer_norm, add_layer_norm.why_not),
    )


@cache
@torch.inference_mode(False)
@torch.enable_grad()
def _problem_of(ours: Operations) -> str | None:
    """What is wrong with fused operations on the GPU at hand, by one small try of each; nobody asked for them."""

    def group_norm(on: Operations, x: Tensor) -> Tensor:
        return on.group_norm(x, 4, x[0, :, 0, 0], x[0, :, 0, 1], 1e-5, True)

    def layer_norm(on: Operations, x: Tensor) -> Tensor:
        return torch.cat(on.add_layer_norm(x, x.cos(), x[0], x[1], 1e-5))

    tries: dict[str, tuple[Callable[[Operations, Tensor], Tensor], tuple[int, ...]]] = {
        "attention": (lambda on, x: on.attend_frames(x), (2, 5, 3, 3, 2, 64)),
        "geglu": (lambda on, x: on.geglu(x), (7, 96)),
        "group norm": (group_norm, (2, 24, 5, 7)),
        "layer norm": (layer_norm, (7, 48)),
    }
    for name, (operation, shape) in tries.items():
        if problem := _difference(name, partial(operation, ours), partial(operation, PLAIN), shape):
            return problem
    return None


def _difference(
    name: str, ours: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> str | None:
    """Where an operation and its gradient differ from PyTorch's by more than the rounding of bfloat16, if they do."""
    draw = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    try:  # as in training, wherever the network is built
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
    return plain.attend_frames(qkv) if why_not(qkv) else kernel(qkv)


def _attend_frames_or_refuse(kernel: Callable[[Tensor], Tensor], why_not: WhyNot, qkv: Tensor) -> Tensor:
    if reason := why_not(qkv):
        raise _refused(reason)
    return kernel(qkv)


def _add_layer_norm_if_it_can(
    kernel: Callable[..., tuple[Tensor, Tensor]], why_not: Callable[..., str | None], *given: Any
) -> tuple[Tensor, Tensor]:
    # Types differ where the sum widens, as under autocast where one summand was computed in float32.
    return plain.add_layer_norm(*given) if why_not(*given[:-1]) else kernel(*given)


def _group_norm_if_it_can(kernel: Callable[..., Tensor], why_not: Callable[..., str | None], *given: Any) -> Tensor:
    return plain.group_norm(*given) if why_not(*given[:4]) else kernel(*given)


def _geglu_if_on_gpu(kernel: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return kernel(x) if x.is_cuda or _interpreting() else plain.geglu(x)
