"""Temporal attention: the kernel and its rivals, at the shapes of the 1.41 B UNet: `python benchmarks/attn.py`.

With a GPU: every shape, forward, backward and both, the core alone and a whole layer. Without
one: what the CPU runs, the kernel in Triton's interpreter against float64, and what it takes of a GPU when compiled.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.attn_rivals import cores, layer_input, layers
from benchmarks.kernel_command import compare
from benchmarks.rows import Row, calls_of, set_bandwidth, time_rows
from benchmarks.timing import buffers, launches_and_peak, random, replayed
from kernels import reference
from vdm.cli import run

# Positions and heads: the transformer after the first convolution, levels 0 to 2 and the middle; level 0 at 512x512.
PLACES = {"in": (1024, 8), "L0": (1024, 5), "L1": (256, 10), "L2": (64, 20), "mid": (16, 20), "L0@512": (4096, 5)}
SMALL = 64  # positions up to which graphs are replayed too
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    place: str
    clips: int
    frames: int
    positions: int
    heads: int
    head_dim: int
    dtype: str

    def __str__(self) -> str:
        sizes = f"B={self.clips} F={self.frames} P={self.positions} H={self.heads} D={self.head_dim}"
        return f"{self.place} {sizes} {self.dtype}"

    def qkv(self, device: torch.device, seed: int = 0) -> Tensor:
        sizes = (self.clips, self.frames, self.positions, 3, self.heads, self.head_dim)
        return random(sizes, device, seed).to(TYPES[self.dtype])

    def bytes(self, which: str) -> int:
        """That must be moved: q, k, v, o; and q, k, v, do, dq, dk, dv."""
        one = self.clips * self.frames * self.positions * self.heads * self.head_dim * TYPES[self.dtype].itemsize
        return one * {"forward": 4, "backward": 7, "both": 11}[which]


def shapes() -> Iterator[Shape]:
    """The most used first."""
    for F, B, (place, (P, H)) in itertools.product((16, 24), (4, 2, 1), PLACES.items()):
        if place != "L0@512" or B == 1:
            yield Shape(place, B, F, P, H, 64, "bf16")
    for F, D, dtype in ((8, 64, "bf16"), (17, 64, "bf16"), (32, 64, "bf16"), (16, 40, "bf16"), (16, 64, "fp16")):
        yield Shape("L1", 2, F, 256, 10, D, dtype)


# One shape


def error_of(rival, qkv: Tensor) -> float:
    """Of output, dq, dk and dv, the largest, against float64 on the same numbers."""
    ours, exact = [x.detach().clone().requires_grad_() for x in rival.lay_out(qkv)], qkv.double().requires_grad_()
    out, expected = rival.run(*ours), reference.temporal_attention(exact)
    grad = random(expected.shape, qkv.device, 1).to(qkv.dtype)
    rival.see(out, qkv).backward(grad)
    expected.backward(grad.double())
    grads = [(x.grad, wanted) for x, wanted in zip(ours, rival.lay_out(exact.grad), strict=True)]
    if len(grads) == 1:
        grads = list(zip(*(grad.unbind(3) for grad in grads[0]), strict=True))
    pairs = [(rival.see(out, qkv), expected), *grads]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def core(shape: Shape, device: torch.device, copy: float, *, compiled: bool) -> list[Row]:
    """Every implementation on its favourite layout, which costs nothing here."""
    rows, calls = [], {}
    for rival in cores(device, compiled=compiled):
        try:
            packed = buffers(lambda seed: shape.qkv(device, seed), device)
            inputs = [rival.lay_out(qkv) for qkv in packed]
            error = error_of(rival, shape.qkv(device))
            passes = calls_of(rival.run, inputs)
            if device.type == "cuda" and shape.positions <= SMALL and not rival.name.endswith("compiled"):
                passes |= graphs_of(passes["forward"])
            for which, call in passes.items():
                call(0)
                launches, peak = launches_and_peak(call, device)
                rows.append(Row("core", str(shape), which, rival.name, launches=launches, peak_mb=peak, error=error))
                calls[which, rival.name] = call
        except Exception as failure:  # shown in the table, whatever a backend or a compiler raises
            rows.append(Row("core", str(shape), "all", rival.name, unsupported=str(failure).split("\n")[0][:100]))
    time_rows(rows, calls, device)
    set_bandwidth(rows, copy, shape.bytes)
    return rows


def graphs_of(forward: Callable[[int], object]) -> dict[str, Callable[[int], object]]:
    """The forward pass as a graph; nothing where a backend cannot be captured."""
    try:
        return {"forward, graph replayed": replayed(forward)}
    except RuntimeError:
        return {}


def layer(shape: Shape, device: torch.device, *, compiled: bool) -> list[Row]:
    """Whole layers, from what the network around them has, with every copy they need."""
    size = int(shape.positions**0.5)
    channels = shape.heads * shape.head_dim
    kinds = layers(device, channels=channels, heads=shape.heads, frames=shape.frames, compiled=compiled)
    rows, calls = [], {}
    clips = random((shape.clips, channels, shape.frames, size, size), device, 0).to(TYPES[shape.dtype])
    clips = clips.contiguous(memory_format=torch.channels_last_3d)
    for name, module in kinds.items():
        try:
            module, x = module.to(device, TYPES[shape.dtype]), layer_input(name, clips)
            for which, call in calls_of(module, [[x]], list(module.parameters())).items():
                call(0)
                launches, peak = launches_and_peak(call, device)
                rows.append(Row("layer", str(shape), which, name, launches=launches, peak_mb=peak))
                calls[which, name] = call
        except Exception as failure:  # as above
            rows.append(Row("layer", str(shape), "all", name, unsupported=str(failure).split("\n")[0][:100]))
    time_rows(rows, calls, device)
    return rows


# What is measured, with a GPU and without


CHECK = """
import json, torch
from kernels import reference
from kernels.temporal_attention import temporal_attention
errors = {}
for frames in (1, 7, 16, 17, 24, 33):
    qkv = torch.randn(2, frames, 3, 3, 2, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    out, expected = temporal_attention(qkv), reference.temporal_attention(exact)
    out.square().sum().backward(); expected.square().sum().backward()
    pairs = ((out, expected), (qkv.grad, exact.grad))
    errors[f"{frames} frames"] = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
print(json.dumps(errors))
"""


def gpu_rows(device: torch.device, copy: float) -> Iterator[Row]:
    for shape in shapes():
        full = shape.clips == 4 and shape.frames == 16 and shape.place in ("L0", "L2")  # compiling takes seconds
        yield from core(shape, device, copy, compiled=full)
        if shape.frames == 16 and shape.head_dim == 64 and shape.dtype == "bf16" and shape.place != "in":
            yield from layer(shape, device, compiled=full and shape.place == "L0")


def cpu_rows(device: torch.device, copy: float) -> Iterator[Row]:
    for frames in (16, 24):
        shape = Shape("L0", 1, frames, 256, 5, 64, "fp32")
        yield from core(shape, device, copy, compiled=False)
    yield from layer(Shape("L0", 1, 16, 256, 5, 64, "fp32"), device, compiled=False)


if __name__ == "__main__":
    command = partial(compare, prog="attn.py", title=str(__doc__), gpu_rows=gpu_rows, cpu_rows=cpu_rows, check=CHECK)
    raise SystemExit(run(command))
