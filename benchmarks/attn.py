"""Temporal attention: the kernel and its rivals, at the shapes of the 1.41 B UNet: `python benchmarks/attn.py`.

With a GPU: every shape, forward, backward and both, the core alone and a whole layer, in under three minutes. Without
one: what the CPU runs, the kernel in Triton's interpreter against float64, and what it takes of a GPU when compiled.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.attn_rivals import cores, layer_input, layers
from benchmarks.common import environment, write_json
from benchmarks.timing import buffers, clocks, copy_bandwidth, interleaved, launches_and_peak, random, replayed
from kernels import reference
from vdm.cli import Parser, run
from vdm.generate import pick_device

ROOT = Path(__file__).resolve().parents[1]
# Positions and heads: the transformer after the first convolution, levels 0 to 2 and the middle; level 0 at 512x512.
PLACES = {"in": (1024, 8), "L0": (1024, 5), "L1": (256, 10), "L2": (64, 20), "mid": (16, 20), "L0@512": (4096, 5)}
SMALL = 64  # positions up to which launching takes as long as computing, so that graphs are replayed too
PASSES = ("forward", "backward", "both")
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


@dataclass
class Row:
    """One implementation at one shape in one pass; milliseconds, or why there are none."""

    level: str
    shape: str
    which: str
    name: str
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    gb_per_s: float | None = None
    of_copy: float | None = None  # share of the copy bandwidth measured here
    launches: int | None = None
    peak_mb: float | None = None  # beyond what was there before
    error: float | None = None  # of output, dq, dk, dv in the Euclidean norm, against float64: the largest
    ours_is_faster: float | None = None  # times
    unsupported: str | None = None


def shapes() -> Iterator[Shape]:
    for (place, (P, H)), B, F in itertools.product(PLACES.items(), (4, 2, 1), (16, 24)):
        if place != "L0@512" or B == 1:
            yield Shape(place, B, F, P, H, 64, "bf16")
    for F, D, dtype in ((8, 64, "bf16"), (17, 64, "bf16"), (32, 64, "bf16"), (16, 40, "bf16"), (16, 64, "fp16")):
        yield Shape("L1", 2, F, 256, 10, D, dtype)


# One shape


def calls_of(forward: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> dict[str, Callable[[int], object]]:
    """The three passes; the backward pass alone is that of graphs that are kept."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = [forward(leaf) for leaf in leaves]
    grads = [torch.randn_like(out) for out in outs]
    count = len(inputs)

    def without_graph(i: int) -> object:
        with torch.no_grad():
            return forward(inputs[i % count])

    def backward(i: int) -> object:
        return torch.autograd.grad(outs[i % count], leaves[i % count], grads[i % count], retain_graph=True)

    def both(i: int) -> object:
        return torch.autograd.grad(forward(leaves[i % count]), leaves[i % count], grads[i % count])

    return dict(zip(PASSES, (without_graph, backward, both), strict=True))


def error_of(rival, qkv: Tensor) -> float:
    """Of output, dq, dk and dv, the largest, against float64 on the same numbers."""
    ours, exact = (x.requires_grad_() for x in (rival.lay_out(qkv).detach().clone(), qkv.double()))
    out, expected = rival.run(ours), reference.temporal_attention(exact)
    grad = random(expected.shape, qkv.device, 1).to(qkv.dtype)
    rival.see(out, qkv).backward(grad)
    expected.backward(grad.double())
    wanted = rival.lay_out(exact.grad)
    axis = 0 if wanted.dim() == 5 else 3
    pairs = [(rival.see(out, qkv), expected), *zip(ours.grad.unbind(axis), wanted.unbind(axis), strict=True)]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def core(shape: Shape, device: torch.device, copy: float, *, compiled: bool) -> list[Row]:
    """Every implementation on its favourite layout, which costs nothing here."""
    rows, calls = [], {}
    for rival in cores(device, compiled=compiled):
        try:
            inputs = buffers(lambda seed, rival=rival: rival.lay_out(shape.qkv(device, seed)), device)
            error = error_of(rival, shape.qkv(device))
            passes = calls_of(rival.run, inputs)
            if device.type == "cuda" and shape.positions <= SMALL and not rival.name.endswith("compiled"):
                passes["forward, graph replayed"] = replayed(passes["forward"])
            for which, call in passes.items():
                call(0)
                launches, peak = launches_and_peak(call, device)
                rows.append(Row("core", str(shape), which, rival.name, launches=launches, peak_mb=peak, error=error))
                calls[which, rival.name] = call
        except Exception as failure:  # shown in the table, whatever a backend or a compiler raises
            rows.append(Row("core", str(shape), "all", rival.name, unsupported=str(failure).split("\n")[0][:100]))
    time_rows(rows, calls, device)
    for row in rows:
        if row.ms is not None:
            row.gb_per_s = shape.bytes(row.which.split(",")[0]) / row.ms / 1e6
            row.of_copy = row.gb_per_s * 1e9 / copy
    return rows


def layer(shape: Shape, device: torch.device, *, compiled: bool) -> list[Row]:
    """Whole layers, from what the network around them has, with every copy they need."""
    size = int(shape.positions**0.5)
    channels = shape.heads * shape.head_dim
    kinds = layers(device, channels=channels, heads=shape.heads, frames=shape.frames, compiled=compiled)
    rows, calls = [], {}
    for name, module in kinds.items():
        module = module.to(device, TYPES[shape.dtype])
        clips = random((shape.clips, channels, shape.frames, size, size), device, 0).to(TYPES[shape.dtype])
        x = layer_input(name, clips.contiguous(memory_format=torch.channels_last_3d))
        for which, call in calls_of(module, [x]).items():
            launches, peak = launches_and_peak(call, device)
            rows.append(Row("layer", str(shape), which, name, launches=launches, peak_mb=peak))
            calls[which, name] = call
    time_rows(rows, calls, device)
    return rows


def time_rows(rows: list[Row], calls: dict[tuple[str, str], Callable[[int], object]], device: torch.device) -> None:
    """Fill in the times, and how often as fast our first row is. Ours twice: the second shows the noise."""
    for which in dict.fromkeys(which for which, _ in calls):
        mine = {name: call for (one, name), call in calls.items() if one == which}
        ours = next(name for name in mine if name.startswith("vdm"))
        seconds = interleaved({**mine, f"{ours}, again": mine[ours]}, device)
        rows.append(Row(rows[0].level, rows[0].shape, which, f"{ours}, again"))
        middle = statistics.median(seconds[ours])
        for row in rows:
            if row.which == which and row.name in seconds:
                low, *_, high = statistics.quantiles(seconds[row.name], n=5)
                row.ms, row.p20, row.p80 = (1e3 * x for x in (statistics.median(seconds[row.name]), low, high))
                row.ours_is_faster = row.ms / 1e3 / middle


# Without a GPU


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
    errors[frames] = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
print(json.dumps(errors))
"""


def interpreter_check() -> dict[str, float]:
    """Error of the kernel, forward and backward, in float32 against float64, for some numbers of frames."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True)
    if done.returncode:
        return {}
    found: dict[str, float] = json.loads(done.stdout)
    return found


def registers() -> list[str]:
    """What the kernels take of a GPU, as far as it can be found without one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "kernels.offline", "bf16"], env=environment, capture_output=True, text=True
    )
    return done.stdout.splitlines() if done.returncode == 0 else []


# The command


def table(rows: Sequence[Row]) -> Iterator[str]:
    columns = ("level", "shape", "pass", "implementation", "ms [p20, p80]", "GB/s", "of copy", "launches", "peak MB")
    yield f"| {' | '.join((*columns, 'ours is faster', 'error'))} |\n" + "|---" * (len(columns) + 2) + "|"
    for row in rows:
        cells = [row.level, row.shape, row.which, row.name]
        cells.append(row.unsupported or f"{row.ms:.3f} [{row.p20:.3f}, {row.p80:.3f}]")
        formats = {"gb_per_s": ".0f", "of_copy": ".0%", "launches": "d", "peak_mb": ".1f", "ours_is_faster": ".2f"}
        for key, form in {**formats, "error": ".1e"}.items():
            value = getattr(row, key)
            cells.append("" if value is None else format(value, form))
        yield f"| {' | '.join(cells)} |"


def gpu_rows(device: torch.device, copy: float) -> Iterator[Row]:
    for shape in shapes():
        full = shape.clips == 4 and shape.frames == 16 and shape.place in ("L0", "L2")  # compiling takes seconds
        yield from core(shape, device, copy, compiled=full)
        if shape.clips == 4 and shape.place != "in":
            yield from layer(shape, device, compiled=full and shape.place == "L0")


def cpu_rows(device: torch.device, copy: float) -> Iterator[Row]:
    for frames in (16, 24):
        shape = Shape("L0", 1, frames, 256, 5, 64, "fp32")
        yield from core(shape, device, copy, compiled=False)
    yield from layer(Shape("L0", 1, 16, 256, 5, 64, "fp32"), device, compiled=False)


def command(arguments: Sequence[str]) -> None:
    parser = Parser(prog="attn.py", description=str(__doc__).split("\n")[0])
    parser.flag("--device", help="cuda or cpu; a GPU by default where there is one")
    parser.flag("--json", type=Path, metavar="FILE", help="save the table")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    copy = copy_bandwidth(device)
    facts = {**environment(device), "gpu": clocks() if on_gpu else None, "copy_gb_per_s": copy / 1e9}
    facts["others"] = {name: version(name) for name in ("triton", "diffusers") if find_spec(name) is not None}
    print(json.dumps(facts, indent=1))
    if not on_gpu:
        print("There is no GPU: these are CPU times, in which the kernel has no part. How fast it is, they do not say.")
    rows = list((gpu_rows if on_gpu else cpu_rows)(device, copy))
    for line in table(rows):
        print(line)
    record: dict[str, object] = {**facts, "rows": [asdict(row) for row in rows]}
    if not on_gpu:
        errors, taken = interpreter_check(), registers()
        print("the kernel in Triton's interpreter, float32 against float64, by frames:", errors or "triton is missing")
        print(*(taken or ["the kernel is not compiled here: triton or its ptxas is missing"]), sep="\n")
        record |= {"interpreter": errors, "compiled": taken}
    if options.json:
        write_json(options.json, record)


if __name__ == "__main__":
    raise SystemExit(run(command))
