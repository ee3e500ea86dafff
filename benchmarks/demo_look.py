"""What the demo model makes, to be looked at, and whether it has seen it: `python benchmarks/demo_look.py`.

Samples three prompts of each action, drawn by lot, writes them as one picture, and looks for each clip's nearest one
among the training clips. What is near is told by clips of the renderer that were never trained on: their nearest
training clips are as near as chance brings them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
from tqdm import tqdm

from benchmarks.common import environment, write_json
from benchmarks.demo import draw_prompts, sampled
from vdm.cli import Parser, run
from vdm.data.dataset import VALIDATION_OFFSET
from vdm.data.mini_something import render_clip
from vdm.data.sheet import contact_sheet
from vdm.errors import UserError
from vdm.generate import pick_device
from vdm.pipeline import TextToVideo

SIDE, FRAMES = 16, 4  # clips are compared as so many small frames


def small(clip: np.ndarray) -> np.ndarray:
    """uint8 (T,H,W,3) -> float32 (FRAMES*SIDE*SIDE*3,), frames evenly spaced in time, in [0,1]."""
    chosen = clip[np.linspace(0, len(clip) - 1, FRAMES).round().astype(int)]
    frames = [cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for frame in chosen]
    return np.stack(frames).astype(np.float32).ravel() / 255


def nearest(clips: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (N,D) the root mean squared distance to the nearest of (M,D), and its number."""
    squares = (clips**2).sum(1)[:, None] + (others**2).sum(1) - 2.0 * clips @ others.T
    found = squares.argmin(1)
    return np.sqrt(((clips - others[found]) ** 2).mean(1)), found


def trained_on(sets: Sequence[tuple[int, int]], **sizes: Any) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The training clips of (seed, count) each, `small`, and the seed and number of each."""
    names = [(seed, index) for seed, count in sets for index in range(count)]
    clips = (small(render_clip(i, seed=seed, **sizes).frames) for seed, i in tqdm(names, desc="rendering", leave=False))
    return np.stack(list(clips)), names


def held_out(count: int, *, seed: int, **sizes: Any) -> np.ndarray:
    """As many clips that no run has trained on."""
    first = 3 * VALIDATION_OFFSET
    return np.stack([small(render_clip(first + i, seed=seed, **sizes).frames) for i in range(count)])


def command(arguments: Sequence[str]) -> None:
    parser = Parser(prog="benchmarks/demo_look.py", description=str(__doc__).split("\n")[0])
    parser.flag("--checkpoint", type=Path, metavar="DIR", help="a checkpoint folder; the shipped demo model by default")
    parser.flag("--clips_per_action", type=int, default=3, metavar="N", help="of each of the 16 actions (default 3)")
    parser.flag("--seed", type=int, default=48, metavar="N", help="of the prompts and the noise (default 48)")
    parser.flag(
        "--trained",
        nargs="+",
        default=["0:40000", "1:10000", "2:12000", "3:16000"],
        metavar="SEED:CLIPS",
        help="what was trained on (default: what the shipped model was)",
    )
    parser.flag("--sheet", type=Path, metavar="FILE", help="write the picture there")
    parser.flag("--json", type=Path, metavar="FILE", help="write the distances")
    parser.flag("--device", metavar="D", help="cpu, cuda, cuda:1 ...; a GPU by default where there is one")
    options = parser.parse_args(arguments)
    try:
        sets = [(int(seed), int(count)) for seed, count in (one.split(":") for one in options.trained)]
    except ValueError:
        raise UserError(f"--trained wants SEED:CLIPS, such as 0:40000, got {' '.join(options.trained)}") from None
    if min(options.clips_per_action, *(count for _, count in sets)) < 1:
        raise UserError("--clips_per_action and the clips of --trained must be at least 1")
    pipe = TextToVideo.from_pretrained(options.checkpoint).to(pick_device(options.device))
    prompts = draw_prompts(options.clips_per_action, seed=options.seed)
    clips = list(sampled(pipe, prompts, seed=options.seed))
    if options.sheet:
        contact_sheet(options.sheet, clips, captions=prompts, columns_frames=4, across=4)
    data = pipe.config.data
    sizes = {"height": data.height, "width": data.width, "num_frames": data.max_frames, "fps": data.fps}
    seen, names = trained_on(sets, **sizes)
    ours, found = nearest(np.stack([small(clip) for clip in clips]), seen)
    real, _ = nearest(held_out(4 * len(prompts), seed=sets[0][0], **sizes), seen)
    summary = {
        "samples": {"clips": len(ours), "nearest": float(ours.min()), "median": float(np.median(ours))},
        "held out": {"clips": len(real), "nearest": float(real.min()), "median": float(np.median(real))},
        "nearer than any held out": int((ours < real.min()).sum()),
    }
    for name, row in summary.items():
        print(name, row)
    rows = [
        {"prompt": prompt, "distance": float(distance), "seed": names[i][0], "index": names[i][1]}
        for prompt, distance, i in zip(prompts, ours, found, strict=True)
    ]
    if options.json:
        write_json(options.json, {"environment": environment(pipe.device), **summary, "trained": sets, "rows": rows})


if __name__ == "__main__":
    raise SystemExit(run(command))
