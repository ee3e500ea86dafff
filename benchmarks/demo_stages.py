"""At which noise the demo model goes wrong: `python benchmarks/demo_stages.py`.

Rendered clips that no run has seen are noised to a level and denoised from there under their own captions, by those of
DDIM's steps that are left; then `vdm.metrics.actions` judges them. What such a clip shows wrongly was lost below that
level: the layout was there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import environment, write_json
from benchmarks.demo import BATCH, SCORES, TEMPLATES, rendered, summarise
from vdm.cli import Parser, run
from vdm.data.dataset import VALIDATION_OFFSET
from vdm.data.mini_something import Rendered
from vdm.data.video import to_float, to_uint8, to_video
from vdm.diffusion import ddim_sample, guided
from vdm.errors import UserError
from vdm.generate import pick_device
from vdm.metrics.actions import judge
from vdm.pipeline import TextToVideo

LEVELS = (0.02, 0.06, 0.1, 0.2, 0.5)  # of the time steps: where a clip is put in
SEED = 7  # of the clips and the noise


@torch.no_grad()
def denoised(pipe: TextToVideo, clips: Sequence[Rendered], *, level: float, steps: int) -> tuple[Tensor, Tensor]:
    """Clips (B,3,T,H,W) in [-1,1], made again from `level` on, and the mean squared errors (B,) of their latents.

    level in (0,1] is a share of the schedule, steps how many DDIM would take of all of it, of which those below it are
    taken. Raises UserError if there are none.
    """
    schedule, total = pipe.schedule, len(pipe.schedule.betas)
    times = schedule.timesteps(steps)
    left = times[times < level * total]
    if not len(left):
        raise UserError(f"none of {steps} steps is below {level} of the schedule; raise --steps or --levels")
    video = torch.stack([to_float(to_video(clip.frames)) for clip in clips]).to(pipe.device)
    z = pipe.vae.encode(video).mode()
    noise = [torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(SEED + int(clip.id))) for clip in clips]
    denoise = guided(
        pipe.unet,
        pipe.text_encoder([clip.label for clip in clips]),
        pipe.text_encoder([""] * len(clips)),
        scale=pipe.config.sampling.guidance_scale,
    )
    x = schedule.add_noise(z, torch.stack(noise).to(pipe.device), left[:1].expand(len(clips)))
    x = ddim_sample(denoise, x, schedule, num_steps=steps, skip=steps - len(left))
    return pipe.vae.decode(x), (x - z).square().flatten(1).mean(1)


def measure(pipe: TextToVideo, clips: Sequence[Rendered], *, level: float, steps: int) -> dict[str, object]:
    """Scores and the mean error of latents from one level on."""
    verdicts, errors = [], []
    for first in tqdm(range(0, len(clips), BATCH), desc=f"from {level:g}", unit="batch", leave=False):
        videos, squares = denoised(pipe, clips[first : first + BATCH], level=level, steps=steps)
        verdicts += [judge(to_uint8(video.cpu())) for video in videos]
        errors += squares.tolist()
    scores = summarise(verdicts, [clip.label for clip in clips])
    return {"level": level, "latent_mse": float(np.mean(errors)), **{name: scores[name] for name in SCORES}}


def command(arguments: Sequence[str]) -> None:
    parser = Parser(prog="benchmarks/demo_stages.py", description=str(__doc__).split("\n")[0])
    parser.flag("--checkpoint", type=Path, metavar="DIR", help="a checkpoint folder; the shipped demo model by default")
    parser.flag("--clips_per_action", type=int, default=3, metavar="N", help="of each of the 16 actions (default 3)")
    parser.flag("--levels", type=float, nargs="+", default=LEVELS, metavar="F", help="shares of the schedule, in (0,1]")
    parser.flag("--steps", type=int, default=50, metavar="N", help="of DDIM over the whole schedule (default 50)")
    parser.flag("--json", type=Path, metavar="FILE", help="write the rows, after every one")
    parser.flag("--device", metavar="D", help="cpu, cuda, cuda:1 ...; a GPU by default where there is one")
    options = parser.parse_args(arguments)
    if options.clips_per_action < 1 or not all(0.0 < level <= 1.0 for level in options.levels):
        raise UserError("--clips_per_action must be at least 1, and --levels above 0 and at most 1")
    device = pick_device(options.device)
    pipe = TextToVideo.from_pretrained(options.checkpoint).to(device)
    streams = (rendered(3 * VALIDATION_OFFSET, actions=[name], seed=SEED, data=pipe.config.data) for name in TEMPLATES)
    clips = [clip for stream in streams for clip in islice(stream, options.clips_per_action)]
    rows = []
    for level in options.levels:
        rows.append(row := measure(pipe, clips, level=level, steps=options.steps))
        cells = [f"{name} {row[name]['right']} of {row[name]['clips']}" for name in SCORES]  # type: ignore[index]
        print(f"from {level:<5g} latent MSE {row['latent_mse']:.4f}  {'  '.join(cells)}", flush=True)
        if options.json:
            write_json(options.json, {"environment": environment(device), "settings": vars(options), "rows": rows})


if __name__ == "__main__":
    raise SystemExit(run(command))
