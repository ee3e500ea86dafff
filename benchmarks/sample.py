"""How fast clips are sampled, beside diffusers' pipeline with the same weights: `python benchmarks/sample.py`.

The shipped demo model by default; a folder's with `--checkpoint`, random weights of a config with `--config`. From
prompts to latents, and to frames: all contenders in one process, in turn; medians; seconds of the CPU on a CPU. On a
GPU ours is there twice, the second time by a CUDA graph (`sampling.cuda_graph`).
`--rival diffusers` converts the model and adds diffusers' own pipeline, which is then given the same noise; on a GPU it
too is there twice, the second time with its UNet channels_last and compiled (mode "reduce-overhead").
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import environment, versions, write_json
from benchmarks.contenders import EAGER, RIVALS, TUNED, channels_last
from benchmarks.timing import clocks, interleaved, launches_and_peak
from vdm.cli import Parser, run
from vdm.components import Components, without_sources
from vdm.config import load
from vdm.errors import UserError
from vdm.generate import DTYPES, PROMPTS, pick_device
from vdm.interop.convert import convert
from vdm.pipeline import TextToVideo, build_components

PARTS = {"to latents": "latent", "to frames": "np"}


@dataclass
class Row:
    """One contender, as far as latents or to the end; all clips of a batch together."""

    name: str
    part: str
    seconds: float
    p20: float
    p80: float
    videos_per_minute: float
    peak_gb: float | None
    launches: int | None
    ours_is_faster: float | None = None


def rival_of(pipe: TextToVideo, folder: Path) -> Any:
    """diffusers' pipeline of the same weights, by way of files in `folder`."""
    if find_spec("diffusers") is None or find_spec("transformers") is None:
        raise UserError("--rival diffusers needs diffusers and transformers; run: pip install -e '.[parity]'")
    from diffusers import DiffusionPipeline

    pipe.save_pretrained(folder / "ours")
    convert(folder / "ours", folder / "theirs", to="diffusers")
    other = DiffusionPipeline.from_pretrained(folder / "theirs")
    other.set_progress_bar_config(disable=True)
    return other


def compiled(pipe: Any) -> Any:
    """The same pipeline with a UNet of its own, tuned as diffusers' users tune it."""
    unet = channels_last(copy.deepcopy(pipe.unet))
    parts = {**pipe.components, "unet": torch.compile(unet, mode="reduce-overhead", dynamic=False)}
    other = type(pipe)(**parts)
    other.set_progress_bar_config(disable=True)
    return other


def calls_of(
    pipes: dict[str, Any], prompts: Sequence[str], options: dict[str, Any]
) -> dict[str, dict[str, Callable[[int], Any]]]:
    """By part and contender."""

    def sample(pipe: Any, kind: str, i: int) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        return pipe(list(prompts), generator=generators, output_type=kind, **options).frames

    return {part: {name: partial(sample, pipe, kind) for name, pipe in pipes.items()} for part, kind in PARTS.items()}


def measure(calls: dict[str, dict[str, Callable[[int], Any]]], clips: int, device: torch.device) -> list[Row]:
    rows = []
    for part, mine in calls.items():
        facts = {name: launches_and_peak(call, device) for name, call in mine.items()}
        seconds = interleaved(mine, device)
        ours = statistics.median(seconds["vdm"])
        for name, times in seconds.items():
            middle = statistics.median(times)
            low, *_, high = statistics.quantiles(times, n=5)
            launches, peak = facts[name]
            gb = None if peak is None else peak / 1e3
            rows.append(Row(name, part, middle, low, high, 60 * clips / middle, gb, launches, middle / ours))
    return rows


def table(rows: Sequence[Row]) -> Iterator[str]:
    titles = ("part", "implementation", "seconds [p20, p80]", "videos/min", "peak GB", "launches", "ours is faster")
    yield f"| {' | '.join(titles)} |\n" + "|---" * len(titles) + "|"
    for row in rows:
        cells = [
            row.part,
            row.name,
            f"{row.seconds:.2f} [{row.p20:.2f}, {row.p80:.2f}]",
            f"{row.videos_per_minute:.1f}",
        ]
        for key, form in {"peak_gb": ".2f", "launches": "d", "ours_is_faster": ".2f"}.items():
            value = getattr(row, key)
            cells.append("" if value is None else format(value, form))
        yield f"| {' | '.join(cells)} |"


def apart(calls: dict[str, Callable[[int], Any]]) -> float:
    """The largest difference of values in 0 to 1 between ours and the rival."""
    theirs = next(name for name in calls if name.startswith("diffusers"))
    frames = [torch.as_tensor(calls[name](0)) for name in ("vdm", theirs)]
    return float((frames[0] - frames[1]).abs().max())


def command(arguments: Sequence[str]) -> None:
    parser = Parser(prog="sample.py", description=str(__doc__).split("\n")[0])
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that replace those of --config"
    )
    parser.flag("--checkpoint", type=Path, metavar="DIR", help="a model folder (default: the shipped demo model)")
    parser.flag("--config", type=Path, metavar="FILE", help="random weights of this config instead")
    parser.flag("--rival", choices=RIVALS, help="beside whom; diffusers is both, tuned on a GPU alone")
    parser.flag("--steps", type=int, default=50, metavar="N", help="of DDIM (default 50)")
    parser.flag("--batch_size", type=int, default=4, metavar="N", help="clips at a time (default 4)")
    parser.flag("--guidance_scale", type=float, metavar="F", help="default: the model's")
    for name in ("num_frames", "height", "width"):
        parser.flag(f"--{name}", type=int, metavar="N", help="of each clip (default: the model's)")
    parser.flag("--dtype", choices=tuple(DTYPES), default="fp32", help="of UNet and VAE (default fp32)")
    parser.flag("--device", metavar="D", help="cuda or cpu; a GPU by default where there is one")
    parser.flag("--only", choices=tuple(PARTS), help="measure this alone")
    parser.flag("--json", type=Path, metavar="FILE", help="save the table")
    options = parser.parse_intermixed_args(arguments)
    if options.overrides and options.config is None:
        raise UserError(f"{options.overrides[0]} replaces a value of --config; give that, too")
    if options.checkpoint is not None and options.config is not None:
        raise UserError("give --checkpoint or --config, not both")
    if options.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, got {options.batch_size}")
    device, dtype = pick_device(options.device), DTYPES[options.dtype]
    if options.config is not None:
        config = without_sources(load(options.config, options.overrides))
        pipe = TextToVideo(config, build_components(config))
    else:
        pipe = TextToVideo.from_pretrained(options.checkpoint)
    defaults = pipe.config.sampling
    names = ("guidance_scale", "num_frames", "height", "width")
    given = {name: getattr(options, name) for name in names}
    chosen = {name: getattr(defaults, name) if value is None else value for name, value in given.items()}
    chosen["num_inference_steps"] = options.steps
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(options.batch_size)]
    pipes: dict[str, Any] = {"vdm": pipe}
    with tempfile.TemporaryDirectory() as folder:
        on_gpu = device.type == "cuda"
        if options.rival is not None:
            other = rival_of(pipe, Path(folder)).to(device, dtype)
            if options.rival != TUNED or not on_gpu:
                pipes["diffusers"] = other
            if options.rival != EAGER and on_gpu:
                pipes["diffusers, compiled"] = compiled(other)
        pipe.to(device, dtype)
        if on_gpu:
            parts = Components(pipe.unet, pipe.vae, pipe.text_encoder, pipe.schedule)
            config = replace(pipe.config, sampling=replace(defaults, cuda_graph=True))
            pipes["vdm, replayed"] = TextToVideo(config, parts)
        calls = calls_of(pipes, prompts, chosen)
        facts = {**environment(device), "gpu": clocks() if on_gpu else None, "sampling": chosen}
        facts["others"] = versions("triton", "diffusers")
        if options.rival is not None:
            facts["apart"] = apart(calls["to frames"])
        print(json.dumps(facts, indent=1))
        chosen_calls = {part: calls[part] for part in calls if options.only in (None, part)}
        rows = measure(chosen_calls, options.batch_size, device)
    for line in table(rows):
        print(line)
    if options.json:
        write_json(options.json, {**facts, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    raise SystemExit(run(command))
