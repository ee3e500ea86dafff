"""GEGLU, GroupNorm with SiLU, and residual sum with LayerNorm: the kernels and PyTorch: `python benchmarks/fused.py`.

With a GPU: the shapes of the 1.41 B UNet, forward, backward and both. Without one: what the CPU runs, the kernels in
Triton's interpreter against float64, and what they take of a GPU when compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.kernel_command import compare
from benchmarks.rows import Row, calls_of, set_bandwidth, time_rows
from benchmarks.timing import buffers, launches_and_peak, random
from kernels import reference
from vdm.cli import run
from vdm.models.fused import choose
from vdm.models.operations import PLAIN, Operations

FRAMES = 16
LEVELS = {"L0": (1024, 320), "L1": (256, 640), "L2": (64, 1280)}  # positions and channels


@dataclass(frozen=True)
class Case:
    """An operation on tensors of `sizes`, the first of which is x; `reads` and `writes` are in multiples of x: what
    must be moved forward, and backward."""

    name: str
    place: str
    sizes: tuple[tuple[int, ...], ...]
    apply: Callable[[Operations], Callable[..., Tensor | tuple[Tensor, ...]]]
    exact: Callable[..., Tensor | tuple[Tensor, ...]]
    moves: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.name} {self.place} {self.sizes[0]}"

    def tensors(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """Images (N, C, H, W) have their channels last in memory, as the network's do."""
        found = [random(size, device, seed + i).to(dtype) for i, size in enumerate(self.sizes)]
        return [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in found]

    def bytes(self, which: str, itemsize: int) -> int:
        forward, backward = self.moves
        one = torch.Size(self.sizes[0]).numel() * itemsize
        return int(one * {"forward": forward, "backward": backward, "both": forward + backward}[which])


def cases(clips: int) -> Iterator[Case]:
    """Of one level after the other. What must be moved is what a chip that held a whole group would move."""
    gate = (lambda on: on.geglu, reference.geglu, (1.5, 2.5))
    norm = (_group_norm, _exact_norm, (2.0, 3.0))
    layer = (_layer_norm, _exact_layer, (4.0, 4.0))
    for place, (positions, channels) in LEVELS.items():
        tokens, side = clips * FRAMES * positions, int(positions**0.5)
        affine = ((channels,), (channels,))
        yield Case("geglu", place, ((tokens, 8 * channels),), *gate)
        frames = (clips * FRAMES, channels, side, side)
        yield Case("group norm + silu, a frame", place, (frames, *affine), *norm)
        yield Case("group norm + silu, a video", place, ((clips, channels, FRAMES, positions), *affine), *norm)
        yield Case("add + layer norm", place, ((tokens, channels), (tokens, channels), *affine), *layer)


def _group_norm(on: Operations) -> Callable[..., Tensor]:
    return lambda x, weight, bias: on.group_norm(x, 32, weight, bias, 1e-5, True)


def _exact_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.group_norm(x, 32, weight, bias, 1e-5, True)


def _layer_norm(on: Operations) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda x, branch, weight, bias: on.add_layer_norm(x, branch, weight, bias, 1e-5)


def _exact_layer(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return reference.add_layer_norm(x, branch, weight, bias, 1e-5)


def error_of(case: Case, forward: Callable[..., Tensor | tuple[Tensor, ...]], given: list[Tensor]) -> float:
    """Of outputs and gradients, the largest, against float64 on the same numbers."""
    found = []
    for function, tensors in ((forward, given), (case.exact, [x.double() for x in given])):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(outs, [random(x.shape, x.device, 9).to(given[0].dtype).to(x.dtype) for x in outs])
        found.append([*outs, *(leaf.grad for leaf in leaves)])
    pairs = zip(*found, strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)  # type: ignore[union-attr]


def rows_of(case: Case, kinds: dict[str, Operations], device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Every implementation; also PyTorch's as torch.compile fuses it, on a GPU."""
    forwards = {name: case.apply(operations) for name, operations in kinds.items()}
    if device.type == "cuda":
        torch._dynamo.reset()  # for all cases are one function to it, of which it compiles a few shapes only
        forwards["pytorch compiled"] = torch.compile(case.apply(PLAIN), dynamic=False)
    rows: list[Row] = []
    calls: dict[tuple[str, str], Callable[[int], object]] = {}
    first = buffers(lambda seed: case.tensors(device, dtype, seed)[0], device)
    inputs = [[x, *case.tensors(device, dtype, i)[1:]] for i, x in enumerate(first)]
    for name, forward in forwards.items():
        try:
            error = error_of(case, forward, inputs[0])
            for which, call in calls_of(forward, inputs).items():
                call(0)
                launches, peak = launches_and_peak(call, device)
                rows.append(Row("operation", str(case), which, name, launches=launches, peak_mb=peak, error=error))
                calls[which, name] = call
        except Exception as failure:  # shown in the table, whatever a compiler raises
            rows.append(Row("operation", str(case), "all", name, unsupported=str(failure).split("\n")[0][:100]))
    time_rows(rows, calls, device)
    return rows


def gpu_rows(device: torch.device, copy: float) -> Iterator[Row]:
    for clips in (4, 1):
        for case in cases(clips):
            rows = rows_of(case, {"vdm": choose("triton"), "pytorch": PLAIN}, device, torch.bfloat16)
            set_bandwidth(rows, copy, lambda which, case=case: case.bytes(which, 2))
            yield from rows


def cpu_rows(device: torch.device, copy: float) -> Iterator[Row]:
    for case in cases(1):
        if case.place == "L1":
            rows = rows_of(case, {"vdm": PLAIN}, device, torch.float32)
            set_bandwidth(rows, copy, lambda which, case=case: case.bytes(which, 4))
            yield from rows


CHECK = """
import json, torch
from benchmarks.fused import cases, error_of
from dataclasses import replace
from vdm.models.fused import choose
errors, small = {}, {64: 2, 256: 3, 1024: 4, 320: 32, 640: 64, 1280: 96, 2560: 40, 5120: 24, 10240: 16}
on, cpu = choose("triton"), torch.device("cpu")
for case in cases(1):
    shrunk = replace(case, sizes=tuple(tuple(small.get(n, min(n, 20)) for n in size) for size in case.sizes))
    errors[f"{case.name} {shrunk.sizes[0]}"] = error_of(case, case.apply(on), shrunk.tensors(cpu, torch.float32))
print(json.dumps(errors))
"""


if __name__ == "__main__":
    command = partial(compare, prog="fused.py", title=str(__doc__), gpu_rows=gpu_rows, cpu_rows=cpu_rows, check=CHECK)
    raise SystemExit(run(command))
