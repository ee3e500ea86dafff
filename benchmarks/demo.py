"""Does the model do what the prompt says, by pixels alone? `python benchmarks/demo.py`.

Prompts are mini-something's own captions with colours and shapes drawn anew, equally many for each action; clips are
judged by the fixed rules of `vdm.metrics.actions`, which do not know the prompt. `--real` judges rendered clips: the
ceiling; `--reconstructed` judges them after the autoencoder: the model's own. "chance" is the score with all prompts
against all clips. `--gauge`: how much a caption matters.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import environment, row_of, write_json
from vdm.checkpoint import CONFIG, MANIFEST, verify
from vdm.cli import Parser, run
from vdm.components import SHIPPED
from vdm.config import load, override
from vdm.data.captions import caption
from vdm.data.casting import compose
from vdm.data.dataset import VALIDATION_OFFSET
from vdm.data.mini_something import Rendered, render_clip
from vdm.data.phrasing import num_forms, rephrased
from vdm.data.settings import DataConfig
from vdm.data.transforms import resize
from vdm.data.video import to_float, to_uint8, to_video
from vdm.errors import UserError
from vdm.generate import pick_device, require_of_sampling
from vdm.metrics.action_scores import mark, read_prompt, score
from vdm.metrics.actions import RULES_VERSION, Verdict, judge
from vdm.metrics.frechet import frechet_distance
from vdm.metrics.motion import measure_flows, warping_error
from vdm.metrics.toy import SIZE, load_toy_classifier
from vdm.models import VideoVAE
from vdm.pipeline import TextToVideo
from vdm.vocabulary import ACTIONS, COLOURS, COVER, SHAPES, SHAPES_WITH_A_TOP

BATCH = 8
PLAIN_FORM = 3  # of a caption in natural words: the caption itself
GAUGED_AT = (0.8, 0.97, 1.0)  # of the noise schedule
SCORES = ("action", "direction", "colour", "shape", "joint")

TEMPLATES = {action.name: action.template for action in ACTIONS}
LATERAL = ("push_left_to_right", "push_right_to_left", "pull_left_to_right", "pull_right_to_left")
REVERSIBLE = (*LATERAL, "move_towards_camera", "move_away_from_camera", "move_closer", "move_apart")  # in pairs
REVERSED = {name: REVERSIBLE[i ^ 1] for i, name in enumerate(REVERSIBLE)}


def summarise(verdicts: Sequence[Verdict], texts: Sequence[str]) -> dict[str, Any]:
    """What is right of the clips that these prompts asked for, with chance; and by action, what was shown instead."""
    prompts = [read_prompt(text) for text in texts]
    scores = score(verdicts, prompts)
    marks = [mark(verdict, prompt) for verdict in verdicts for prompt in prompts]
    summary: dict[str, Any] = {}
    for name in SCORES:
        held = [getattr(one, name) for one in marks if getattr(one, name) is not None]
        summary[name] = row_of(getattr(scores, name)) | {"chance": sum(held) / len(held) if held else None}
    recall = {name: row_of(share) for name, share in scores.recall.items()}
    return summary | {"actions": recall, "confusion": scores.confusion, "rules_version": RULES_VERSION}


def draw_prompts(clips_per_action: int, *, seed: int, other_words: bool = False) -> list[str]:
    """Captions such as mini-something writes, action by action in turn; or other words for the same, of the same
    things."""
    rng, wording, prompts = np.random.default_rng(seed), np.random.default_rng([seed, 1]), []
    for action in ACTIONS * clips_per_action:
        shapes = rng.choice(SHAPES_WITH_A_TOP if action.name == "turn_upside_down" else SHAPES, size=2)
        colours = rng.choice(list(COLOURS), size=2, replace=False)
        named = 1 if action.name == "cover" else action.num_slots
        fillers = [f"a {colour} {shape}" for colour, shape in zip(colours, shapes, strict=True)][:named]
        fillers += [COVER] * (action.num_slots - named)
        if other_words:
            forms = [form for form in range(num_forms(action.template)) if form != PLAIN_FORM]
            prompts.append(rephrased(action.template, fillers, form=int(wording.choice(forms))))
        else:
            prompts.append(caption(action.template, fillers))
    return prompts


def rendered(first: int, *, actions: Collection[str], seed: int, data: DataConfig) -> Iterator[Rendered]:
    """Clips of these actions, from index `first` on, as a config cuts them."""
    size = {"height": data.height, "width": data.width, "num_frames": data.max_frames}
    chosen = (index for index in count(first) if compose(index, seed=seed).action.name in actions)
    return (render_clip(index, seed=seed, fps=data.fps, masks=False, **size) for index in chosen)


def unseen(clips_per_action: int, *, seed: int, data: DataConfig) -> list[Rendered]:
    """So many rendered clips of each action that are in no training or validation set."""
    streams = (rendered(2 * VALIDATION_OFFSET, actions=[name], seed=seed, data=data) for name in TEMPLATES)
    return [clip for stream in streams for clip in islice(stream, clips_per_action)]


class Real:
    """Twice as many rendered clips as are sampled, as the classifier behind `fvd_toy` sees them."""

    def __init__(self, clips_per_action: int, *, seed: int, data: DataConfig):
        seen = features(clip.frames for clip in unseen(2 * clips_per_action, seed=seed, data=data))
        # Of each action one half is what is held against, and the other says how far real clips are from these.
        self.reference, self.others = seen.unflatten(0, (-1, 2, clips_per_action)).transpose(0, 1).flatten(1, 2)

    def distance(self, clips: Sequence[np.ndarray]) -> dict[str, float]:
        """`fvd_toy` of as many clips, and its floor: that of the other real ones."""
        value, floor = (frechet_distance(some, self.reference) for some in (features(clips), self.others))
        return {"value": value, "floor": floor, "clips": len(clips)}


@torch.no_grad()
def features(clips: Iterable[np.ndarray]) -> torch.Tensor:
    """(N,128) float32 of clips uint8 (T,H,W,3)."""
    net = load_toy_classifier()
    small = (np.stack([resize(frame, SIZE, SIZE) for frame in clip]) for clip in clips)
    return torch.cat([net(torch.from_numpy(clip)[None]).features for clip in small])


def judge_real(clips_per_action: int, *, seed: int, data: DataConfig, vae: VideoVAE | None = None) -> dict[str, Any]:
    """Scores of rendered clips that are in no training or validation set; after an autoencoder also what it loses."""
    clips = unseen(clips_per_action, seed=seed, data=data)
    texts = [clip.label for clip in clips]
    if vae is None:
        return summarise([judge(clip.frames) for clip in clips], texts)
    again = [reconstructed(clip.frames, vae) for clip in tqdm(clips, desc="encoding", unit="clip", leave=False)]
    squares = [np.square(ours.astype(float) - clip.frames).mean() for ours, clip in zip(again, clips, strict=True)]
    lost = {
        "psnr": 10.0 * np.log10(255.0**2 / np.mean(squares)),
        "warping_error": _warping([clip.frames for clip in clips]),
        "warping_error_after": _warping(again),
    }
    return summarise([judge(frames) for frames in again], texts) | {"lost": {k: float(x) for k, x in lost.items()}}


def _warping(clips: Sequence[np.ndarray]) -> float:
    errors = [warping_error(measure_flows(torch.from_numpy(frames))).mse for frames in clips]
    return float(np.mean([error for error in errors if error is not None]))


@torch.no_grad()
def reconstructed(frames: np.ndarray, vae: VideoVAE) -> np.ndarray:
    """A clip uint8 (T,H,W,3) after the autoencoder."""
    video = to_float(to_video(frames))[None].to(next(vae.parameters()).device)
    return to_uint8(vae.decode(vae.encode(video).mode())[0].cpu())


def sampled(pipe: TextToVideo, prompts: Sequence[str], *, seed: int, **options: Any) -> Iterator[np.ndarray]:
    """Clips uint8 (T,H,W,3), as long as those that the model learned from; clip i starts from the noise of seed + i."""
    for first in tqdm(range(0, len(prompts), BATCH), desc="sampling", unit="batch", leave=False):
        some = prompts[first : first + BATCH]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(some))]
        frames = pipe(some, num_frames=pipe.config.data.max_frames, generator=generators, **options).frames
        yield from (np.asarray(frames) * 255).round().astype(np.uint8)


def judge_generated(pipe: TextToVideo, options: argparse.Namespace, *, real: Real | None = None) -> dict[str, Any]:
    """Scores of the model's clips, and how far they are from real ones where these are given."""
    prompts = draw_prompts(options.clips_per_action, seed=options.seed, other_words=options.other_words)
    chosen = {name: getattr(options, name) for name in ("guidance_scale", "sampler")}
    clips = list(sampled(pipe, prompts, seed=options.seed, num_inference_steps=options.steps, **chosen))
    scores = summarise([judge(clip) for clip in clips], prompts)
    return scores if real is None else scores | {"fvd_toy": real.distance(clips)}


@torch.no_grad()
def gauge(pipe: TextToVideo, num_clips: int) -> list[dict[str, Any]]:
    """The error of clips predicted under their caption, and the gap to that under the reversed one, at each GAUGED_AT.

    Mean squared errors of latents, over validation clips whose action has an exact reverse: the `lateral` ones, where
    that is the same words in another order, and the others. A gap comes with its standard error.
    """
    stream = rendered(VALIDATION_OFFSET, actions=REVERSED, seed=pipe.config.seed, data=pipe.config.data)
    clips, last = list(islice(stream, num_clips)), len(pipe.schedule.betas) - 1
    errors = np.zeros((len(GAUGED_AT), num_clips, 2))  # right, reversed
    for i, clip in enumerate(tqdm(clips, desc="gauging", unit="clip", leave=False)):
        z = pipe.vae.encode(to_float(to_video(clip.frames))[None].to(pipe.device)).mode()
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(i)).to(pipe.device)
        context = pipe.text_encoder([clip.label, caption(TEMPLATES[REVERSED[clip.action]], clip.placeholders)])
        for row, level in enumerate(GAUGED_AT):
            t = torch.tensor([round(level * last)], device=pipe.device)
            x_t = pipe.schedule.add_noise(z, noise, t)
            x0, _ = pipe.schedule.predictions(pipe.unet(x_t, t, context).float(), x_t, t)
            errors[row, i] = (x0 - z).square().flatten(1).mean(1).cpu()
    lateral = np.array([clip.action in LATERAL for clip in clips])
    rows = []
    for name, some in (("lateral", lateral), ("other", ~lateral)):
        for level, pairs in zip(GAUGED_AT, errors[:, some], strict=True):
            gap, spread = np.diff(pairs).mean(), np.diff(pairs).std(ddof=1) / len(pairs) ** 0.5
            numbers = {"t": level, "error": pairs[:, 0].mean(), "gap": gap, "standard_error": spread}
            rows.append({"captions": name, **{key: float(value) for key, value in numbers.items()}})
    return rows


def manifest_hash(folder: Path) -> str:
    """Which weights these are; a `UserError` where they are not as they were saved."""
    verify(folder)
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _print(record: dict[str, Any]) -> None:
    for row in record.get("gauge", ()):
        print("{captions:<8} t {t:.2f}  error {error:.5f}  gap {gap:+.5f} +- {standard_error:.5f}".format(**row))
    if "scores" not in record:
        return
    for name, row in record["scores"]["actions"].items():
        others = {k: n for k, n in record["scores"]["confusion"][name].items() if k != name}
        print(f"{name:<24}{row['right']:>4} of {row['clips']}", *(f"  {k} {n}" for k, n in others.items()))
    if lost := record["scores"].get("lost"):
        line = "PSNR {psnr:.2f} dB; warping error {warping_error:.6f} of real clips, {warping_error_after:.6f} after"
        print(line.format(**lost))
    if distance := record["scores"].get("fvd_toy"):
        print("fvd_toy {value:.1f}, of as many real clips {floor:.1f}".format(**distance))
    for name in SCORES:
        row = record["scores"][name]
        if row["clips"]:
            line = "{:<10}{value:7.1%}  [{ci95[0]:.1%}, {ci95[1]:.1%}]  {right} of {clips}, chance {chance:.1%}"
            print(line.format(name, **row))


def _parser() -> Parser:
    parser = Parser(prog="benchmarks/demo.py", description="Does the model do what the prompt says?")
    told = "what has no flag, such as sampling.pag_scale=0.5"
    parser.add_argument("overrides", nargs="*", metavar="sampling.key=value", help=told)
    parser.flag("--checkpoint", type=Path, metavar="DIR", help="a checkpoint folder; the shipped demo model by default")
    parser.flag("--clips_per_action", type=int, default=10, metavar="N", help="of each of the 16 actions (default 10)")
    parser.flag("--steps", "--num_inference_steps", type=int, default=50, metavar="N", help="of denoising (default 50)")
    parser.flag("--guidance_scale", type=float, metavar="F", help="that of the checkpoint by default")
    parser.flag("--sampler", choices=("ddim", "ddpm", "dpmpp"), help="that of the checkpoint by default")
    parser.flag("--other_words", action="store_true", help='prompts such as "someone is dragging a box to the right"')
    parser.flag("--seed", type=int, default=0, metavar="N", help="of the prompts and the noise (default 0)")
    parser.flag("--json", type=Path, metavar="FILE", help="write all numbers, and what they were measured with")
    parser.flag("--device", metavar="D", help="cpu, cuda, cuda:1 ...; a GPU by default where there is one")
    parser.flag("--real", action="store_true", help="judge rendered clips instead of the model's: the ceiling")
    parser.flag("--reconstructed", action="store_true", help="judge rendered clips after the model's autoencoder")
    parser.flag("--gauge", type=int, nargs="?", const=32, metavar="N", help="only the caption gap, on N clips (or 32)")
    return parser


def _require_useful(options: argparse.Namespace) -> None:
    """Of the overrides, that they change something."""
    require_of_sampling(options.overrides)
    if options.overrides and (options.real or options.reconstructed or options.gauge is not None):
        raise UserError(f"{options.overrides[0]!r} is of sampling, and nothing is sampled here; leave it out")
    for one in options.overrides:
        if one.strip().startswith(("sampling.num_inference_steps", "sampling.num_frames")):
            raise UserError(f"{one!r} changes nothing here: give --steps, and clips are as long as those of training")


def demo_command(arguments: Sequence[str]) -> None:
    options = _parser().parse_intermixed_args(arguments)
    for name, least in (("clips_per_action", 1), ("gauge", 16), ("seed", 0)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    _require_useful(options)
    device, folder, data = pick_device(options.device), options.checkpoint or SHIPPED, DataConfig(height=64, width=64)
    record: dict[str, Any] = {"environment": environment(device), "settings": vars(options)}
    if not options.real or options.checkpoint is not None:
        data = load(folder / CONFIG).data
        record["manifest_sha256"] = manifest_hash(folder)
    if options.real + options.reconstructed + (options.gauge is not None) > 1:
        raise UserError("give one of --real, --reconstructed and --gauge")
    if options.reconstructed:
        vae = TextToVideo.from_pretrained(folder).to(device).vae
        record["scores"] = judge_real(options.clips_per_action, seed=options.seed, data=data, vae=vae)
    elif options.real:
        record["scores"] = judge_real(options.clips_per_action, seed=options.seed, data=data)
    elif options.gauge is None:
        pipe = TextToVideo.from_pretrained(folder).to(device)
        pipe.config = override(pipe.config, options.overrides)
        real = Real(options.clips_per_action, seed=options.seed, data=data)
        record["scores"] = judge_generated(pipe, options, real=real)
    else:
        record["gauge"] = gauge(TextToVideo.from_pretrained(folder).to(device), options.gauge)
    _print(record)
    if options.json is not None:
        write_json(options.json, record)


if __name__ == "__main__":
    sys.exit(run(demo_command))
