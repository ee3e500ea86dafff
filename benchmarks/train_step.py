"""How fast the UNet trains, beside diffusers': `python benchmarks/train_step.py --config configs/a100.yaml`.

A forward pass without gradients, one with its backward pass, and both with the optimizer's step, on random latents and
contexts: all contenders in one process, in turn; medians. Without a config: a UNet of 58 M parameters, for CPUs, in
float32. Precision, recomputation and compilation are the config's. `--rival diffusers` adds diffusers' UNet with the
same weights as it is, and on a GPU tuned (bf16, channels_last, compiled).
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.common import environment, versions, write_json
from benchmarks.contenders import (
    EAGER,
    RIVALS,
    SMALL,
    TUNED,
    Contender,
    diffusers_as_it_is,
    diffusers_tuned,
    ours,
    replayed,
    same_weights,
)
from benchmarks.oracles import fitting, relative
from benchmarks.timing import clocks, interleaved, launches_and_peak, random
from vdm.cli import Parser, run
from vdm.config import Config, load
from vdm.errors import UserError
from vdm.flops import count
from vdm.generate import pick_device
from vdm.models import UNet3D
from vdm.models.dropout import clip_seeds
from vdm.models.onednn import packed
from vdm.training.settings import AUTOCAST
from vdm.training.throughput import peak_tflops

PASSES = ("forward", "forward and backward", "step")


@dataclass(frozen=True)
class Task:
    """What is run: `clips` of `frames` at latents of (height, width), with texts of `tokens`."""

    clips: int
    frames: int
    height: int
    width: int
    tokens: int = 77

    def inputs(self, unet: Contender, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        config = unet.module.config
        channels, width = config.in_channels, getattr(config, "context_dim", None) or config.cross_attention_dim
        latents = random((self.clips, channels, self.frames, self.height, self.width), device, 0)
        context = random((self.clips, self.tokens, width), device, 1)
        dtype = next(unet.module.parameters()).dtype
        return latents.to(dtype), torch.full((self.clips,), 500, device=device), context.to(dtype)

    def flops(self, config: Config) -> int:
        """Of a forward pass of ours: of the products, convolutions and attention that it makes."""
        with torch.device("meta"):
            unet = UNet3D(replace(config.model, attention_kernel="sdpa"))  # a kernel takes no tensor of this device
            latents = torch.empty(self.clips, config.model.in_channels, self.frames, self.height, self.width)
            context = torch.empty(self.clips, self.tokens, config.model.context_dim)
            return count(lambda: unet(latents, torch.zeros(self.clips), context))


@dataclass
class Row:
    """One contender in one pass. TFLOP/s count three forward passes of ours for a step, whoever makes it."""

    name: str
    which: str
    ms: float
    p20: float
    p80: float
    videos_per_minute: float
    tflops: float
    mfu: float | None
    peak_gb: float | None
    launches: int | None
    ours_is_faster: float | None = None


def passes_of(unet: Contender, task: Task, device: torch.device) -> dict[str, Callable[[int], object]]:
    given = task.inputs(unet, device)
    target = torch.randn_like(given[0])
    optimizer = torch.optim.AdamW(unet.module.parameters(), lr=1e-5, fused=True)

    def forward(i: int) -> object:
        unet.module.eval()
        with torch.no_grad():
            return unet(*given)

    def backward(i: int) -> None:
        unet.module.train()
        unet.module.zero_grad(set_to_none=True)
        with clip_seeds(range(task.clips)):  # as in training: each clip has a dropout of its own
            (unet(*given).float() - target.float()).square().mean().backward()

    def step(i: int) -> None:
        backward(i)
        optimizer.step()

    return dict(zip(PASSES, (forward, backward, step), strict=True))


def measure(
    contenders: Sequence[Contender], task: Task, config: Config, device: torch.device, passes: Sequence[str]
) -> list[Row]:
    """Rows of all, pass by pass, in turn."""
    flops, rows, precision = task.flops(config), [], config.training.mixed_precision
    peak = peak_tflops(torch.cuda.get_device_name(device), mixed_precision=precision) if device.type == "cuda" else None
    calls = {one.name: passes_of(one, task, device) for one in contenders}
    for which in passes:
        mine = {name: several[which] for name, several in calls.items()}
        facts = {}
        with ExitStack() as meanwhile:
            if which == "forward":  # as in sampling: the weights stay as they are from call to call
                for one in contenders:
                    meanwhile.enter_context(packed(one.module))
            for name, call in mine.items():
                call(0)
                facts[name] = launches_and_peak(call, device, in_all=True)
            seconds = interleaved(mine, device)
        for name, times in seconds.items():
            middle, (low, *_, high) = statistics.median(times), statistics.quantiles(times, n=5)
            tflops = flops * (1 if which == "forward" else 3) / middle / 1e12
            launches, megabytes = facts[name]
            rows.append(
                Row(
                    name, which, *(1e3 * x for x in (middle, low, high)), 60 * task.clips / middle, tflops,
                    None if peak is None else tflops / peak, None if megabytes is None else megabytes / 1e3, launches,
                )
            )  # fmt: skip
    return rows


def compared(
    contenders: list[Contender], task: Task, config: Config, device: torch.device, passes: Sequence[str]
) -> Iterator[list[Row]]:
    """The rows so far: of all in turn on a CPU; on a GPU, which has no room for all, of one after the other, each taken
    from the list. The first is ours."""
    if device.type == "cpu":
        yield related(measure(contenders, task, config, device, passes))
        return
    rows: list[Row] = []
    while contenders:
        one = contenders.pop(0)
        one.module.to(device)
        try:
            rows += measure([one], task, config, device, passes)
        except torch.OutOfMemoryError:
            print(f"{one.name} does not fit into the GPU's memory")
        one.module.zero_grad(set_to_none=True)
        one.module.to("cpu")
        del one  # and the graphs that it may keep, with their memory
        gc.collect()
        torch.cuda.empty_cache()
        yield related(rows)


def related(rows: list[Row]) -> list[Row]:
    """The same, each row with how often as fast ours is."""
    ours_ms = {row.which: row.ms for row in rows if row.name == "vdm"}
    for row in rows:
        row.ours_is_faster = row.ms / ours_ms[row.which] if row.which in ours_ms else None
    return rows


def table(rows: Sequence[Row]) -> Iterator[str]:
    titles = ("pass", "implementation", "ms [p20, p80]", "videos/min", "TFLOP/s", "MFU", "peak GB", "launches")
    yield f"| {' | '.join((*titles, 'ours is faster'))} |\n" + "|---" * (len(titles) + 1) + "|"
    for row in rows:
        cells = [row.which, row.name, f"{row.ms:.1f} [{row.p20:.1f}, {row.p80:.1f}]"]
        formats = {"videos_per_minute": ".1f", "tflops": ".3g", "mfu": ".1%", "peak_gb": ".2f", "launches": "d"}
        for key, form in {**formats, "ours_is_faster": ".2f"}.items():
            value = getattr(row, key)
            cells.append("" if value is None else format(value, form))
        yield f"| {' | '.join(cells)} |"


def profile(unet: Contender, task: Task, device: torch.device, folder: Path) -> None:
    """Write a trace of one forward and backward pass, for a browser's chrome://tracing, and a table of its kernels."""
    step = passes_of(unet, task, device)["forward and backward"]
    step(0)
    with torch.profiler.profile(record_shapes=True) as profiler:
        step(0)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    (folder / "kernels.txt").write_text(profiler.key_averages().table(sort_by=order, row_limit=40), encoding="utf-8")


def contenders_of(config: Config, device: torch.device, rival: str | None) -> list[Contender]:
    """Ours first. With a rival, all have the same weights."""
    training, on_gpu = config.training, device.type == "cuda"
    autocast = None if training.mixed_precision == "no" else AUTOCAST[training.mixed_precision]
    how = training.gradient_checkpointing if isinstance(training.gradient_checkpointing, str) else "none"
    found = [ours(config.model, device, autocast=autocast, recompute=how, compiled=training.compile)]
    if on_gpu and how == "none" and not training.compile:
        found.append(replayed(config.model, device, autocast=autocast))
    if rival is not None:
        found += rivals(found[0], config, device, rival)
    for one in found:
        one.module.to("cpu")  # each comes to a GPU when it is its turn
    return found


def rivals(mine: Contender, config: Config, device: torch.device, rival: str) -> list[Contender]:
    if find_spec("diffusers") is None:
        raise UserError(f"--rival {rival} needs diffusers; run: pip install -e '.[parity]'")
    found = []
    if rival != TUNED:
        found.append(diffusers_as_it_is(config.model, device, autocast=mine.autocast))
        same_weights(mine, found[0])
    if rival != EAGER and device.type == "cuda":
        found.append(diffusers_tuned(config.model, device))
    return found


def command(arguments: Sequence[str]) -> None:
    parser = Parser(prog="train_step.py", description=str(__doc__).split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the config's")
    parser.flag("--config", type=Path, metavar="FILE", help="a YAML file; without it a small UNet, in float32")
    parser.flag("--rival", choices=RIVALS, help="beside whom; diffusers is both, tuned on a GPU alone")
    parser.flag("--only", choices=PASSES, help="measure this pass alone")
    parser.flag("--batch_size", type=int, metavar="N", help="clips (default: the config's, or 1)")
    parser.flag("--num_frames", type=int, default=16, metavar="N", help="of each clip (default 16)")
    parser.flag("--size", type=int, default=256, metavar="N", help="height and width in pixels (default 256)")
    parser.flag("--device", metavar="D", help="cuda or cpu; a GPU by default where there is one")
    parser.flag("--profile", type=Path, metavar="DIR", help="write a trace and the top kernels of ours there")
    parser.flag("--json", type=Path, metavar="FILE", help="save the table")
    options = parser.parse_intermixed_args(arguments)
    if options.overrides and options.config is None:
        raise UserError(f"{options.overrides[0]} replaces a value of --config; give that, too")
    device = pick_device(options.device)
    config = fitting(model=SMALL) if options.config is None else load(options.config, options.overrides)
    clips = options.batch_size or (1 if options.config is None else config.training.batch_size)
    if min(clips, options.num_frames, options.size) < 1 or options.size % config.vae.factor:
        raise UserError(f"sizes must be positive, and --size divisible by {config.vae.factor}; got {options.size}")
    latent = options.size // config.vae.factor
    task = Task(clips, options.num_frames, latent, latent)
    contenders = contenders_of(config, device, options.rival)
    facts = {**environment(device), "gpu": clocks() if device.type == "cuda" else None, "task": asdict(task)}
    facts["others"] = versions("triton", "diffusers")
    chosen = ("mixed_precision", "gradient_checkpointing", "compile")
    facts["training"] = {name: getattr(config.training, name) for name in chosen}
    if len(contenders) > 1 and device.type == "cpu":
        with torch.no_grad():
            outputs = [unet(*task.inputs(unet, device)) for unet in contenders[:2]]
        facts["apart"] = relative(*outputs)
    print(json.dumps(facts, indent=1))
    rows, mine = list[Row](), contenders[0]
    for rows in compared(contenders, task, config, device, [options.only] if options.only else PASSES):
        if options.json:  # compiling the next may take longer than there is time
            write_json(options.json, {**facts, "rows": [asdict(row) for row in rows]})
    for line in table(rows):
        print(line)
    if options.profile:
        mine.module.to(device)
        profile(mine, task, device, options.profile)


if __name__ == "__main__":
    raise SystemExit(run(command))
