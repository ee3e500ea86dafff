"""How far the judge of actions can be trusted: `python benchmarks/actions.py --num_clips 500 --size 64 128`.

Rendered clips of the validation set, on which no rule was tuned, are judged as they are (what a perfect model would
score), without their motion (what a model that ignores the prompt's verb would), and damaged in the ways that
generated clips are. Two changes whose effect on an action is known, mirroring and rewinding, need no labels at all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import environment, row_of, write_json
from vdm.cli import Parser, run
from vdm.data.dataset import VALIDATION_OFFSET
from vdm.data.mini_something import Rendered, render_clip
from vdm.data.video import read_clip, to_float, to_video, write_video
from vdm.errors import UserError
from vdm.metrics.action_scores import Scores, Share, read_prompt, score
from vdm.metrics.actions import RULES_VERSION, Verdict, judge
from vdm.pipeline import TextToVideo
from vdm.vocabulary import MIRRORED, REWOUND

FPS, NUM_FRAMES = 8.0, 16
MOST_ENCODED = 100  # clips that the demo model's autoencoder is tried on: it takes longer than all else together

Clip = np.ndarray  # uint8 (T,H,W,3)
Change = Callable[[Clip, np.random.Generator], Clip]


def frozen(clip: Clip, _: np.random.Generator) -> Clip:
    return np.repeat(clip[:1], len(clip), axis=0)


def shuffled(clip: Clip, rng: np.random.Generator) -> Clip:
    return clip[rng.permutation(len(clip))]


def pure_noise(clip: Clip, rng: np.random.Generator) -> Clip:
    return rng.integers(256, size=clip.shape, dtype=np.uint8)


def noisy(sigma: float) -> Change:
    def change(clip: Clip, rng: np.random.Generator) -> Clip:
        return np.clip(np.rint(clip + rng.normal(0, sigma, clip.shape)), 0, 255).astype(np.uint8)

    return change


def blurred(sigma: float) -> Change:
    return lambda clip, _: np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in clip])


def as_jpeg(clip: Clip, _: np.random.Generator, *, quality: int = 40) -> Clip:
    packed = [cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for frame in clip]
    return np.stack([np.asarray(cv2.imdecode(one, cv2.IMREAD_COLOR))[..., ::-1] for one in packed])


def halved(clip: Clip, _: np.random.Generator) -> Clip:
    """Half as large and back again."""
    height, width = clip.shape[1:3]
    small = [cv2.resize(frame, (width // 2, height // 2), interpolation=cv2.INTER_AREA) for frame in clip]
    return np.stack([cv2.resize(frame, (width, height)) for frame in small])


def as_mp4(clip: Clip, _: np.random.Generator) -> Clip:
    """As sample.py writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, clip, fps=FPS)
        return read_clip(path, fps=FPS, num_frames=len(clip), start=0.0)


def encoded() -> Change:
    """Through the demo model's autoencoder: the best that the demo model can do."""
    vae = TextToVideo.from_pretrained().vae

    @torch.no_grad()
    def change(clip: Clip, _: np.random.Generator) -> Clip:
        video = vae.decode(vae.encode(to_float(to_video(clip))[None]).mode())[0]
        return ((video.permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()

    return change


def _rows(scores: Scores) -> dict[str, Any]:
    names = ("valid", "action", "direction", "colour", "shape", "joint")
    return {name: row_of(getattr(scores, name)) for name in names}


def _judge(clips: Iterable[Clip], *, what: str, total: int) -> list[Verdict]:
    return [judge(clip) for clip in tqdm(clips, desc=what, total=total, unit="clip", leave=False)]


def measure(clips: Sequence[Rendered], *, seed: int) -> dict[str, Any]:
    """All numbers on these clips, as JSON values."""
    prompts, frames = [read_prompt(clip.label) for clip in clips], [clip.frames for clip in clips]
    started = time.process_time()
    real = _judge(frames, what="real", total=len(clips))
    milliseconds = 1000 * (time.process_time() - started) / len(clips)
    scores = score(real, prompts)

    def changed(name: str, change: Change, most: int | None = None) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        some = frames[:most]
        verdicts = _judge((change(clip, rng) for clip in some), what=name, total=len(some))
        return _rows(score(verdicts, prompts[: len(some)]))

    ceilings = {"frozen": frozen, "shuffled": shuffled, "pure noise": pure_noise}
    damages: dict[str, Change] = {
        "noise 8": noisy(8),
        "noise 15": noisy(15),
        "blur 1": blurred(1),
        "blur 1.5": blurred(1.5),
        "jpeg 40": as_jpeg,
        "halved": halved,
        "mp4": as_mp4,
    }
    return {
        "milliseconds_per_clip": milliseconds,
        "real": _rows(scores),
        "recall": {name: row_of(share) for name, share in scores.recall.items()},
        "confusion": scores.confusion,
        "without_motion": {name: changed(name, change) for name, change in ceilings.items()},
        "damaged": {
            **{name: changed(name, change) for name, change in damages.items()},
            "autoencoder": changed("autoencoder", encoded(), MOST_ENCODED),
        },
        "metamorphic": _metamorphic(clips, real),
    }


def _metamorphic(clips: Sequence[Rendered], real: Sequence[Verdict]) -> dict[str, Any]:
    """Agreement with what is known: of mirrored clips with the verdict as it was, of rewound ones with the action."""
    mirrored, rewound = [], []
    for clip, verdict in zip(tqdm(clips, desc="metamorphic", unit="clip", leave=False), real, strict=True):
        other = judge(clip.frames[:, :, ::-1])
        mirrored.append(other.action == MIRRORED.get(verdict.action or "", verdict.action))
        if clip.action in REWOUND:
            rewound.append(judge(clip.frames[::-1]).action == REWOUND[clip.action])
    return {
        name: row_of(Share(sum(agreed), len(agreed))) for name, agreed in (("mirrored", mirrored), ("rewound", rewound))
    }


def _print(size: int, record: dict[str, Any]) -> None:
    line = "{:<14}{:>8.1%}  [{:.1%}, {:.1%}]   colour {:.1%}  shape {:.1%}  joint {:.1%}"
    print(f"{size}x{size}: {record['milliseconds_per_clip']:.1f} ms a clip; action accuracy")
    for name, rows in {"real": record["real"], **record["without_motion"], **record["damaged"]}.items():
        others = (rows[key]["value"] for key in ("colour", "shape", "joint"))
        print(line.format(name, rows["action"]["value"], *rows["action"]["ci95"], *others))
    for name, row in record["metamorphic"].items():
        print(f"{name:<14}{row['value']:>8.1%}  {row['right']} of {row['clips']}")
    worst = sorted(record["recall"].items(), key=lambda item: item[1]["value"])[:4]
    print("least recall: " + ", ".join(f"{name} {row['right']} of {row['clips']}" for name, row in worst))


def table(record: dict[str, Any]) -> Iterator[str]:
    """Action accuracy of every kind of clip, by size, as lines of Markdown."""
    sizes = record["sizes"]
    yield f"| clips | {' | '.join(f'{size}x{size}' for size in sizes)} |"
    yield "|---" * (1 + len(sizes)) + "|"
    by_size = [
        {"real": one["real"]["action"]}
        | {name: rows["action"] for name, rows in (one["without_motion"] | one["damaged"]).items()}
        | one["metamorphic"]
        for one in sizes.values()
    ]
    for name in by_size[0]:
        shares = (f"{rows[name]['right']} of {rows[name]['clips']}" for rows in by_size)
        yield f"| {name} | {' | '.join(shares)} |"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="benchmarks/actions.py", description="How far can the judge of actions be trusted?")
    parser.flag("--num_clips", type=int, default=500, metavar="N", help="rendered clips to judge (default 500)")
    parser.flag("--size", type=int, nargs="+", default=[64, 128], metavar="N", help="of frames (default 64 and 128)")
    parser.flag("--seed", type=int, default=0, metavar="N", help="of the scenes, and of all noise (default 0)")
    parser.flag("--json", type=Path, metavar="FILE", help="write all numbers, and what they were measured with")
    return parser


def actions_command(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    for name, value, least in (
        ("num_clips", options.num_clips, 1),
        ("size", min(options.size), 16),
        ("seed", options.seed, 0),
    ):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    if any(size % 8 for size in options.size):
        raise UserError(f"--size must be multiples of 8 for the autoencoder, got {options.size}")
    record: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "settings": {**vars(options), "first_clip": VALIDATION_OFFSET, "num_frames": NUM_FRAMES, "fps": FPS},
        "rules_version": RULES_VERSION,
        "sizes": {},
    }
    for size in options.size:
        shape = {"height": size, "width": size, "num_frames": NUM_FRAMES, "fps": FPS}
        indices = range(VALIDATION_OFFSET, VALIDATION_OFFSET + options.num_clips)
        clips = [render_clip(index, seed=options.seed, **shape) for index in indices]
        record["sizes"][str(size)] = measure(clips, seed=options.seed)
        _print(size, record["sizes"][str(size)])
    if options.json is not None:
        write_json(options.json, record)


if __name__ == "__main__":
    sys.exit(run(actions_command))
