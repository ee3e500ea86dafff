"""How long calls take, on a GPU or a CPU, measured so that what else the machine does strikes all alike."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

REPEATS = {"cuda": 100, "cpu": 30}
# What takes long is repeated so often at least, and no more once it has taken so many seconds.
LEAST, ENOUGH = {"cuda": 5, "cpu": 7}, {"cuda": 4.0, "cpu": 30.0}


def random(sizes: Sequence[int], device: torch.device, seed: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator(device).manual_seed(seed), device=device)


def clock(call: Callable[[int], object], device: torch.device) -> Callable[[int], float]:
    """call(i) as seconds: of the GPU, by events; of the process's CPUs."""
    if device.type != "cuda":

        def seconds(i: int) -> float:
            began = time.process_time()
            call(i)
            return time.process_time() - began

        return seconds

    began = time.perf_counter()
    call(0)
    cycles = int(4e9 * (time.perf_counter() - began))  # of a GPU below 2 GHz: twice as long as launching takes
    torch.cuda.synchronize()

    def on_gpu(i: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(min(cycles, 20_000_000))  # all is launched before any of it begins
        begin.record()
        call(i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return on_gpu


def interleaved(calls: dict[str, Callable[[int], object]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn, so that what else the machine does strikes all alike."""
    for call in calls.values():
        for _ in range(3):
            call(0)
    clocks = {name: clock(call, device) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for i in range(REPEATS[device.type]):
        for name, one in clocks.items():
            found[name].append(one(i))
        enough = time.perf_counter() - began > ENOUGH[device.type] * len(calls)
        if enough and i + 1 >= LEAST[device.type]:
            break
    return found


def buffers(make: Callable[[int], Tensor], device: torch.device) -> list[Tensor]:
    """As many inputs as fill the GPU's last cache three times, so that none is found there."""
    first = make(0)
    if device.type != "cuda":
        return [first]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [first, *(make(i) for i in range(1, min(256, 1 + 3 * cache // max(1, first.nbytes))))]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy."""
    size = 2**30 if device.type == "cuda" else 2**24
    source, target = random((size // 4,), device, 0), torch.empty(size // 4, device=device)
    return 2 * size / statistics.median(interleaved({"": lambda i: target.copy_(source)}, device)[""])


def launches_and_peak(
    call: Callable[[int], object], device: torch.device, *, in_all: bool = False
) -> tuple[int | None, float | None]:
    """How many kernels a call launches, and the megabytes of a GPU it takes: beyond what was there, or `in_all`.

    The latter is all that PyTorch holds of it, with what graphs keep for themselves.
    """
    if device.type != "cuda":
        return None, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call(0)
        torch.cuda.synchronize()
    launches = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profiler.events())
    before = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    peak = torch.cuda.max_memory_reserved() if in_all else torch.cuda.max_memory_allocated() - before
    return launches, peak / 1e6


def replayed(call: Callable[[int], object]) -> Callable[[int], object]:
    """The same as a CUDA graph: no launching from Python, and none between its kernels."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(0)
    return lambda i: graph.replay()


def clocks() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
