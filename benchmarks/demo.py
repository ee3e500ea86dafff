"""Does the model do what the prompt says? Direction and colour, judged by pixels alone: `python benchmarks/demo.py`.

Prompts are mini-something's own captions with colours and shapes drawn anew, equally many for each action. A clip is
judged by the largest patch of the prompted colour in every frame: medians over the first third of the frames against
the last third, by RULES, fixed on rendered clips before any model was judged; the hand is not looked at. `--real`
judges rendered clips: the ceiling. "chance" is the score with others' labels. `--gauge`: how much a caption matters.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import environment, write_json
from vdm.checkpoint import CONFIG, MANIFEST, verify
from vdm.cli import Parser, run
from vdm.components import SHIPPED
from vdm.config import load
from vdm.data.captions import caption
from vdm.data.casting import compose
from vdm.data.dataset import VALIDATION_OFFSET
from vdm.data.mini_something import Rendered, render_clip
from vdm.data.settings import DataConfig
from vdm.data.video import to_float, to_video
from vdm.errors import UserError
from vdm.generate import pick_device
from vdm.metrics.intervals import wilson
from vdm.pipeline import TextToVideo
from vdm.vocabulary import ACTIONS, BACKGROUND_MAX_SATURATION, COLOURS, COVER, SHAPES, SHAPES_WITH_A_TOP

BATCH = 8
GAUGED_AT = (0.8, 0.97, 1.0)  # of the noise schedule
# Wider than what the renderer keeps to, for autoencoders blur and models are pale; no hue of the hand is let in.
MIN_SATURATION, MIN_VALUE, HUE_MARGIN = 110, 60, 3
AREAS = 0.003, 0.4  # of the frame; a smaller or larger patch is no object
STEP = 0.12  # of the frame's width or height: the least that counts as a motion

TEMPLATES = {action.name: action.template for action in ACTIONS}
LATERAL = ("push_left_to_right", "push_right_to_left", "pull_left_to_right", "pull_right_to_left")
REVERSIBLE = (*LATERAL, "move_towards_camera", "move_away_from_camera", "move_closer", "move_apart")  # in pairs
REVERSED = {name: REVERSIBLE[i ^ 1] for i, name in enumerate(REVERSIBLE)}
OPPOSITE = {**REVERSED, "pick_up": "move_down", "move_down": "pick_up", "put_on_surface": "pick_up"}


class Prompt(NamedTuple):
    text: str
    action: str
    colours: tuple[str, ...]


class Track(NamedTuple):
    """The largest patch of one colour in every frame, where it has the size of an object."""

    at: np.ndarray  # (T,2) x and y of its median pixel in fractions of the frame, else NaN
    area: np.ndarray  # (T,) in fractions of the frame, 0 where there is none
    masks: np.ndarray  # (T,H,W) bool


class Motion(NamedTuple):
    """What became of the prompted object from the first to the last third; NaN where that cannot be said."""

    right: float  # in widths
    up: float  # in heights
    growth: float  # of its area, as a factor
    peak: float  # how far above its start it ever was
    wander: float  # the farthest it ever was from its middle place, along one axis
    gone: bool  # no longer there at the very end: then it has no `right`, `up` and `growth`
    travel: float  # sideways, while it was seen
    sunk: float  # below its start when it was last seen
    whitened: float  # share of the place where it was that is white at the end
    closing: float  # by how much the two objects came closer
    turned: float  # by how much its end looks more like its start turned by 180 degrees than like its start


def _moved(m: Motion, along: float, across: float) -> bool:
    return along >= STEP and along > abs(across) and 0.42 < m.growth < 2.4


RULES: dict[str, Callable[[Motion], bool]] = {
    "push_left_to_right": lambda m: _moved(m, m.right, m.up),
    "push_right_to_left": lambda m: _moved(m, -m.right, m.up),
    "pull_left_to_right": lambda m: _moved(m, m.right, m.up),
    "pull_right_to_left": lambda m: _moved(m, -m.right, m.up),
    "pick_up": lambda m: _moved(m, m.up, m.right),
    "move_down": lambda m: _moved(m, -m.up, m.right),
    "put_on_surface": lambda m: _moved(m, -m.up, m.right),
    "move_towards_camera": lambda m: m.growth >= 1.6,
    "move_away_from_camera": lambda m: m.growth <= 1 / 1.6,
    "turn_upside_down": lambda m: m.turned >= 0.1 and max(abs(m.right), abs(m.up)) < STEP,
    "push_off_table": lambda m: m.gone and m.travel >= 0.15 and m.sunk >= 0.03,
    "cover": lambda m: m.gone and m.travel < 0.15 and m.whitened >= 0.6,
    "move_closer": lambda m: m.closing >= STEP,
    "move_apart": lambda m: m.closing <= -STEP,
    "throw_and_catch": lambda m: m.peak >= 0.15 and abs(m.up) <= 0.4 * m.peak and abs(m.right) < STEP,
    "hold": lambda m: m.wander < 0.06 and 1 / 1.4 < m.growth < 1.4,
}


def follow(hsv: np.ndarray, colour: str) -> Track:
    """Find one colour of the vocabulary in a clip, uint8 (T,H,W,3) in OpenCV's HSV."""
    hue, vivid = hsv[..., 0].astype(int), (hsv[..., 1] >= MIN_SATURATION) & (hsv[..., 2] >= MIN_VALUE)
    near = [(hue >= low - HUE_MARGIN) & (hue <= high + HUE_MARGIN) for low, high in COLOURS[colour].hues]
    masks = np.any(near, axis=0) & vivid
    at = np.full((len(hsv), 2), np.nan)
    for t, mask in enumerate(masks):
        _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
        patches = stats[1:, cv2.CC_STAT_AREA] / mask.size  # 0 is the background
        masks[t] = labels == 1 + np.argmax(patches) if len(patches) and AREAS[0] <= max(patches) <= AREAS[1] else False
        if masks[t].any():
            rows, columns = np.nonzero(masks[t])
            at[t] = (np.median(columns) + 0.5) / mask.shape[1], (np.median(rows) + 0.5) / mask.shape[0]
    return Track(at, masks.mean(axis=(1, 2)), masks)


def _median(values: np.ndarray) -> np.ndarray:
    """Over the frames (first axis) that have a value; NaN if none has."""
    seen = values[~np.isnan(values).reshape(len(values), -1).any(axis=1)]
    return np.median(seen, axis=0) if len(seen) else np.full(values.shape[1:], np.nan)


def measure(hsv: np.ndarray, tracks: dict[str, Track], colours: Sequence[str]) -> Motion | None:
    """The motion of the object of the first colour; None where the clip does not start with such an object."""
    track, length = tracks[colours[0]], len(hsv)
    third, eighth = max(1, round(length / 3)), max(1, length // 8)
    seen = np.flatnonzero(track.area)
    if np.mean(track.area[:third] > 0) < 0.5:
        return None
    start, size = _median(track.at[:third]), np.median(track.area[:third])
    gone = bool(np.median(track.area[-eighth:]) < 0.15 * size)
    end = np.full(2, np.nan) if gone else _median(track.at[-third:])
    smooth = np.array([_median(track.at[max(0, t - 1) : t + 2, 1]) for t in range(length)])
    place, final = track.masks[:third].mean(axis=0) > 0.5, hsv[-eighth:]
    white = (final[..., 1] <= BACKGROUND_MAX_SATURATION) & (final[..., 2] >= 190)
    gaps = np.linalg.norm(track.at - tracks[colours[-1]].at, axis=1)
    return Motion(
        right=float(end[0] - start[0]),
        up=float(start[1] - end[1]),
        growth=float("nan") if gone else float(np.median(track.area[-third:]) / size),
        peak=float(start[1] - np.nanmin(smooth)),
        wander=float(np.nanmax(np.abs(track.at - _median(track.at)))),
        gone=gone,
        travel=float(np.ptp(track.at[seen, 0])),
        sunk=float(track.at[seen[-1], 1] - start[1]),
        whitened=float(white[:, place].mean()) if place.any() else 0.0,
        closing=float(_median(gaps[:third]) - _median(gaps[-third:])) if len(colours) > 1 else float("nan"),
        turned=_turned(hsv[seen[[0, -1]], :, :, 2], track.masks[seen[[0, -1]]]),
    )


def _turned(value: np.ndarray, masks: np.ndarray) -> float:
    """Correlate the object's brightness in the last of two frames, (2,H,W), with that in the first, at one size."""
    looks = []
    for brightness, mask in zip(value.astype(np.float32), masks, strict=True):
        x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
        looks.append(cv2.resize((brightness * mask)[y : y + h, x : x + w], (24, 24), interpolation=cv2.INTER_AREA))
    with np.errstate(invalid="ignore"):  # a patch without any contrast looks like nothing: NaN
        turned, upright = (np.corrcoef(one.ravel(), looks[1].ravel())[0, 1] for one in (looks[0][::-1, ::-1], looks[0]))
    return float(turned - upright)


def dominant(tracks: dict[str, Track], colours: Sequence[str], *, part: float = 1.0) -> bool:
    """Whether, in half of the first `part` of the frames, each of `colours` is an object and outweighs all others."""
    frames = slice(max(1, round(len(tracks[colours[0]].area) * part)))
    least = np.min([tracks[colour].area[frames] for colour in colours], axis=0)
    others = np.max([track.area[frames] for colour, track in tracks.items() if colour not in colours], axis=0)
    return bool(np.mean(least > others) >= 0.5)


class Verdict(NamedTuple):
    """What one clip shows."""

    prompt: Prompt
    shown: tuple[str, ...]  # every action whose rule holds
    right: bool  # whether the prompted one is among them
    colour: bool  # whether the prompted colours dominate
    dominant: tuple[str, ...]  # every colour that dominates alone


def judge(frames: np.ndarray, prompt: Prompt) -> Verdict:
    """Judge one clip, uint8 (T,H,W,3) RGB."""
    hsv = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2HSV) for frame in frames])
    tracks = {colour: follow(hsv, colour) for colour in COLOURS}
    motion = measure(hsv, tracks, prompt.colours)
    shown = tuple(name for name, rule in RULES.items() if motion is not None and rule(motion))
    part = 1 / 3 if prompt.action == "cover" else 1.0  # later it is hidden
    alone = tuple(colour for colour in COLOURS if dominant(tracks, [colour], part=part))
    return Verdict(prompt, shown, prompt.action in shown, dominant(tracks, prompt.colours, part=part), alone)


def _score(hits: Sequence[bool], candidates: Sequence[Sequence[str]], scored: Collection[str]) -> dict[str, object]:
    right, clips = sum(hits), len(hits)
    chance = sum(name in shown for shown in candidates for name in scored) / (clips * len(scored))
    return {"value": right / clips, "ci95": wilson(right, clips), "right": right, "clips": clips, "chance": chance}


def summarise(verdicts: Sequence[Verdict]) -> dict[str, object]:
    """Scores, and what was shown; chance is the share of all scored actions (or single colours) that a clip passes."""
    directional = [v for v in verdicts if v.prompt.action in OPPOSITE]
    table: dict[str, object] = {}
    for name in RULES:
        some = [v for v in verdicts if v.prompt.action == name]
        shown = {rule: sum(rule in v.shown for v in some) for rule in RULES}
        hints = {"right": shown[name], "opposite": shown.get(OPPOSITE.get(name, ""), 0), "still": shown["hold"]}
        table[name] = {"clips": len(some), **hints, "colour": sum(v.colour for v in some), "shown": shown}
    return {
        "direction": _score([v.right for v in directional], [v.shown for v in directional], OPPOSITE),
        "action": _score([v.right for v in verdicts], [v.shown for v in verdicts], RULES),
        "colour": _score([v.colour for v in verdicts], [v.dominant for v in verdicts], COLOURS),
        "actions": table,
    }


def draw_prompts(clips_per_action: int, *, seed: int) -> list[Prompt]:
    """Captions such as mini-something writes."""
    rng, prompts = np.random.default_rng(seed), []
    for action in ACTIONS * clips_per_action:
        shapes = rng.choice(SHAPES_WITH_A_TOP if action.name == "turn_upside_down" else SHAPES, size=2)
        colours = tuple(str(colour) for colour in rng.choice(list(COLOURS), size=2, replace=False))
        named = 1 if action.name == "cover" else action.num_slots
        fillers = [f"a {colour} {shape}" for colour, shape in zip(colours, shapes, strict=True)][:named]
        fillers += [COVER] * (action.num_slots - named)
        prompts.append(Prompt(caption(action.template, fillers), action.name, colours[:named]))
    return prompts


def rendered(first: int, *, actions: Collection[str], seed: int, data: DataConfig) -> Iterator[Rendered]:
    """Clips of these actions, from index `first` on, as a config cuts them."""
    size = {"height": data.height, "width": data.width, "num_frames": data.max_frames}
    chosen = (index for index in count(first) if compose(index, seed=seed).action.name in actions)
    return (render_clip(index, seed=seed, fps=data.fps, masks=False, **size) for index in chosen)


def judge_real(clips_per_action: int, *, seed: int, data: DataConfig) -> list[Verdict]:
    """Verdicts on rendered clips that are in no training or validation set."""
    streams = (rendered(2 * VALIDATION_OFFSET, actions=[name], seed=seed, data=data) for name in RULES)
    clips = (clip for stream in streams for clip in islice(stream, clips_per_action))
    return [judge(clip.frames, Prompt(clip.label, clip.action, clip.colours)) for clip in clips]


def judge_generated(pipe: TextToVideo, options: argparse.Namespace) -> list[Verdict]:
    """Verdicts on the model's clips, as long as those it was trained on; clip i starts from the noise of seed + i."""
    prompts, verdicts = draw_prompts(options.clips_per_action, seed=options.seed), []
    for first in tqdm(range(0, len(prompts), BATCH), desc="sampling", unit="batch", leave=False):
        some = prompts[first : first + BATCH]
        video = pipe(
            [prompt.text for prompt in some],
            num_inference_steps=options.steps,
            **{name: getattr(options, name) for name in ("guidance_scale", "sampler")},
            num_frames=pipe.config.data.max_frames,
            generator=[torch.Generator().manual_seed(options.seed + first + i) for i in range(len(some))],
        ).frames
        clips = (np.asarray(video) * 255).round().astype(np.uint8)
        verdicts += [judge(clip, prompt) for clip, prompt in zip(clips, some, strict=True)]
    return verdicts


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


def _print(record: dict[str, Any]) -> None:
    for row in record.get("gauge", ()):
        print("{captions:<8} t {t:.2f}  error {error:.5f}  gap {gap:+.5f} +- {standard_error:.5f}".format(**row))
    if "scores" not in record:
        return
    print(f"{'prompted action':<24}     clips     right  opposite     still    colour")
    for name, row in record["scores"]["actions"].items():
        print("{:<24}{clips:>10}{right:>10}{opposite:>10}{still:>10}{colour:>10}".format(name, **row))
    for name in ("direction", "action", "colour"):
        score = "{:<10}{value:7.1%}  [{ci95[0]:.1%}, {ci95[1]:.1%}]  {right} of {clips}, chance {chance:.1%}"
        print(score.format(name, **record["scores"][name]))


def _parser() -> Parser:
    parser = Parser(prog="benchmarks/demo.py", description="Does the model follow the direction and colour of prompts?")
    parser.flag("--checkpoint", type=Path, metavar="DIR", help="a checkpoint folder; the shipped demo model by default")
    parser.flag("--clips_per_action", type=int, default=10, metavar="N", help="of each of the 16 actions (default 10)")
    parser.flag("--steps", "--num_inference_steps", type=int, default=50, metavar="N", help="of denoising (default 50)")
    parser.flag("--guidance_scale", type=float, metavar="F", help="that of the checkpoint by default")
    parser.flag("--sampler", choices=("ddim", "ddpm", "dpmpp"), help="that of the checkpoint by default")
    parser.flag("--seed", type=int, default=0, metavar="N", help="of the prompts and the noise (default 0)")
    parser.flag("--json", type=Path, metavar="FILE", help="write all numbers, and what they were measured with")
    parser.flag("--device", metavar="D", help="cpu, cuda, cuda:1 ...; a GPU by default where there is one")
    parser.flag("--real", action="store_true", help="judge rendered clips instead of the model's: the ceiling")
    parser.flag("--gauge", type=int, nargs="?", const=32, metavar="N", help="only the caption gap, on N clips (or 32)")
    return parser


def demo_command(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    for name, least in (("clips_per_action", 1), ("gauge", 16), ("seed", 0)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    device, folder, data = pick_device(options.device), options.checkpoint or SHIPPED, DataConfig(height=64, width=64)
    record: dict[str, Any] = {"environment": environment(device), "settings": vars(options)}
    if not options.real or options.checkpoint is not None:
        verify(folder)
        data = load(folder / CONFIG).data
        record["manifest_sha256"] = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    if options.real and options.gauge is not None:
        raise UserError("give --real or --gauge, not both")
    if options.real:
        record["scores"] = summarise(judge_real(options.clips_per_action, seed=options.seed, data=data))
    elif options.gauge is None:
        record["scores"] = summarise(judge_generated(TextToVideo.from_pretrained(folder).to(device), options))
    else:
        record["gauge"] = gauge(TextToVideo.from_pretrained(folder).to(device), options.gauge)
    _print(record)
    if options.json is not None:
        write_json(options.json, record)


if __name__ == "__main__":
    sys.exit(run(demo_command))
