"""Rows of benchmarks of fused operations: one implementation at one shape in one pass; how they are timed and shown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.timing import interleaved

torch._functorch.config.donated_buffer = False  # else what is compiled cannot be run backward twice, as `calls_of` does

PASSES = ("forward", "backward", "both")


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
    error: float | None = None  # of outputs and gradients in the Euclidean norm, against float64: the largest
    ours_is_faster: float | None = None  # times
    unsupported: str | None = None


def calls_of(
    forward: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Sequence[Tensor]],
    parameters: Sequence[Tensor] = (),
) -> dict[str, Callable[[int], object]]:
    """The three passes of forward(*inputs[i]), with gradients of inputs and parameters; the backward pass alone is that
    of graphs that are kept."""
    leaves = [[x.detach().requires_grad_() for x in one] for one in inputs]
    outs = [_several(forward(*one)) for one in leaves]
    grads = [[torch.randn_like(out) for out in several] for several in outs]
    count = len(inputs)

    def without_graph(i: int) -> object:
        with torch.no_grad():
            return forward(*inputs[i % count])

    def backward(i: int) -> object:
        i %= count
        return torch.autograd.grad(outs[i], (*leaves[i], *parameters), grads[i], retain_graph=True)

    def both(i: int) -> object:
        i %= count
        return torch.autograd.grad(_several(forward(*leaves[i])), (*leaves[i], *parameters), grads[i])

    return dict(zip(PASSES, (without_graph, backward, both), strict=True))


def _several(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


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


def set_bandwidth(rows: Sequence[Row], copy: float, moved: Callable[[str], int]) -> None:
    """Fill in GB/s, and its share of `copy` bytes a second; moved(pass) is how many bytes must be."""
    for row in rows:
        if row.ms is not None:
            row.gb_per_s = moved(row.which.split(",")[0]) / row.ms / 1e6
            row.of_copy = row.gb_per_s * 1e9 / copy


def table(rows: Sequence[Row], *, titles: bool = True) -> Iterator[str]:
    columns = ("level", "shape", "pass", "implementation", "ms [p20, p80]", "GB/s", "of copy", "launches", "peak MB")
    if titles:
        yield f"| {' | '.join((*columns, 'ours is faster', 'error'))} |\n" + "|---" * (len(columns) + 2) + "|"
    for row in rows:
        cells = [row.level, row.shape, row.which, row.name]
        cells.append(row.unsupported or f"{row.ms:.3f} [{row.p20:.3f}, {row.p80:.3f}]")
        formats = {"gb_per_s": ".0f", "of_copy": ".0%", "launches": "d", "peak_mb": ".1f", "ours_is_faster": ".2f"}
        for key, form in {**formats, "error": ".1e"}.items():
            value = getattr(row, key)
            cells.append("" if value is None else format(value, form))
        yield f"| {' | '.join(cells)} |"


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each operation and pass: ours, its share of the copy bandwidth, and how often as fast it is as PyTorch
    can be made to do it, eagerly and compiled."""
    titles = ("shape", "pass", "ms", "of copy", "best eager", "times", "best compiled", "times")
    yield f"| {' | '.join(titles)} |\n" + "|---" * len(titles) + "|"
    mine = [row for row in rows if row.name.startswith("vdm") and row.ms and row.which in PASSES]
    for row in mine:
        if row.name.endswith("again") or row.name == "vdm sdpa" or row.level == "layer":
            continue
        others = [r for r in rows if (r.level, r.shape, r.which) == (row.level, row.shape, row.which) and r.ms]
        cells = [row.shape, row.which, f"{row.ms:.3f}", "" if row.of_copy is None else f"{row.of_copy:.0%}"]
        for compiled in (False, True):
            rivals = [r for r in others if not r.name.startswith("vdm") and r.name.endswith("compiled") == compiled]
            best = min(rivals, key=lambda r: r.ms or 0.0, default=None)
            cells += ["", ""] if best is None else [best.name, f"{(best.ms or 0.0) / (row.ms or 1.0):.2f}"]
        yield f"| {' | '.join(cells)} |"
