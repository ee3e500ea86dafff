"""Trains the classifier behind fvd_toy, kvd_toy and is_toy on rendered clips: `python benchmarks/toy_classifier.py`.

Clips are rendered once, into memory, from a seed of their own, and varied at each visit: mirrored (with the action's
name), shifted, brightened, blurred, noisy. The held-out clips, of indices that no training set reaches, are judged as
they are and varied as a model's clips may be. The weights are written in half precision; put their SHA-256 in
vdm/metrics/toy.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import environment, wilson, write_json
from vdm.cli import Parser, run
from vdm.data.dataset import VALIDATION_OFFSET
from vdm.data.mini_something import render_clip
from vdm.errors import UserError
from vdm.metrics.toy import SHIPPED, SIZE, ToyClassifier, load_toy_classifier
from vdm.vocabulary import ACTIONS
from vdm.weights import Weights, sha256, write_safetensors

RESULTS = Path(__file__).parent / "results" / "toy-classifier.json"
FRAMES, FPS, SEED = 16, 8.0, 20
BATCH, PEAK_RATE, DECAY, SHIFT = 32, 2e-3, 0.05, 4  # SHIFT in pixels

NAMES = [action.name for action in ACTIONS]
MIRRORED = {"push_left_to_right": "push_right_to_left", "pull_left_to_right": "pull_right_to_left"}
# The label of each action once left and right are exchanged.
MIRROR = torch.tensor([NAMES.index({**MIRRORED, **{b: a for a, b in MIRRORED.items()}}.get(n, n)) for n in NAMES])


def render(count: int, *, first: int) -> tuple[Tensor, Tensor]:
    """uint8 (count,16,64,64,3), and the number of each clip's action (count,)."""
    clips = torch.empty((count, FRAMES, SIZE, SIZE, 3), dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.long)
    for i in tqdm(range(count), desc="rendering", unit="clip", leave=False, mininterval=10):
        one = render_clip(first + i, seed=SEED, height=SIZE, width=SIZE, num_frames=FRAMES, fps=FPS)
        clips[i], labels[i] = torch.from_numpy(one.frames), NAMES.index(one.action)
    return clips, labels


def vary(clips: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Each clip as another camera would show it, or a model: mirrored, shifted, in other light, soft or noisy."""
    frames, labels = clips.numpy().copy(), labels.clone()
    for i, clip in enumerate(frames):
        if rng.random() < 0.5:
            clip[:] = clip[:, :, ::-1].copy()
            labels[i] = MIRROR[labels[i]]
        frames[i] = _degraded(_shifted(clip, rng), rng)
    return torch.from_numpy(frames), labels


def _shifted(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    dx, dy = rng.integers(-SHIFT, SHIFT + 1, size=2)
    wide = np.pad(clip, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    return wide[:, SHIFT + dy : SHIFT + dy + SIZE, SHIFT + dx : SHIFT + dx + SIZE]


def _degraded(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    gain, offset = rng.uniform(0.85, 1.15), rng.uniform(-12, 12)
    clip = np.clip(np.rint(np.arange(256) * gain + offset), 0, 255).astype(np.uint8)[clip]
    if rng.random() < 0.3:
        sigma = rng.uniform(0.4, 1.2)
        clip = np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in clip])
    if rng.random() < 0.3:
        noise = rng.standard_normal(clip.shape, dtype=np.float32) * np.float32(rng.uniform(0, 8))
        clip = np.clip(np.rint(clip + noise), 0, 255).astype(np.uint8)
    return clip


def train(clips: Tensor, labels: Tensor, *, epochs: int, seed: int) -> ToyClassifier:
    """AdamW under one cycle of the learning rate; every draw follows from `seed`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = ToyClassifier().train()
    steps = epochs * (len(clips) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.15)
    progress = tqdm(total=steps, desc="training", unit="step", leave=False, mininterval=10)
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(len(clips)))
        for chosen in order.split(BATCH)[: len(clips) // BATCH]:
            some, theirs = vary(clips[chosen], labels[chosen], rng)
            loss = F.cross_entropy(net(some).logits, theirs)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    progress.close()
    return net.eval()


@torch.no_grad()
def confusion(net: ToyClassifier, clips: Tensor, labels: Tensor) -> list[list[int]]:
    """How many clips of each action (row) are taken for each (column)."""
    table = torch.zeros((len(ACTIONS), len(ACTIONS)), dtype=torch.long)
    for some, theirs in zip(clips.split(BATCH), labels.split(BATCH), strict=True):
        for truth, taken in zip(theirs, net(some).logits.argmax(1), strict=True):
            table[truth, taken] += 1
    return table.tolist()


def score(table: list[list[int]]) -> dict[str, object]:
    """Accuracy with its Wilson interval, recall of each action, and the table."""
    right, clips = sum(row[i] for i, row in enumerate(table)), sum(map(sum, table))
    recall = {name: table[i][i] / max(1, sum(table[i])) for i, name in enumerate(NAMES)}
    return {"accuracy": right / clips, "ci95": wilson(right, clips), "clips": clips, "recall": recall, "table": table}


def toy_classifier_command(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    for name, least in (("clips", BATCH), ("held_out", 1), ("epochs", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least {least}")
    start = time.perf_counter()
    net = train(*render(options.clips, first=0), epochs=options.epochs, seed=options.seed)
    options.weights.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(options.weights, Weights.of(net.state_dict()).cast(torch.float16))
    minutes, digest = (time.perf_counter() - start) / 60, sha256(options.weights)
    net = load_toy_classifier(options.weights, digest=digest)  # what is judged is what was written
    clips, labels = render(options.held_out, first=VALIDATION_OFFSET)
    record = {
        "environment": environment(torch.device("cpu")),
        "settings": {name: getattr(options, name) for name in ("clips", "held_out", "epochs", "seed")},
        "minutes": minutes,
        "weights_sha256": digest,
        "held_out": score(confusion(net, clips, labels)),
        "held_out_varied": score(confusion(net, *vary(clips, labels, np.random.default_rng(options.seed + 1)))),
    }
    for name in ("held_out", "held_out_varied"):
        row = record[name]
        print("{:<16}{accuracy:7.1%}  [{ci95[0]:.1%}, {ci95[1]:.1%}] of {clips} clips".format(name, **row))
    print(f"{options.weights.name}: SHA-256 {digest}, {minutes:.0f} minutes")
    write_json(options.json, record)


def _parser() -> Parser:
    parser = Parser(
        prog="benchmarks/toy_classifier.py", description="Trains the classifier of mini-something's actions."
    )
    parser.flag("--clips", type=int, default=6400, metavar="N", help="to train on (default 6400)")
    parser.flag("--held_out", type=int, default=1600, metavar="N", help="to judge it by (default 1600)")
    parser.flag("--epochs", type=int, default=9, metavar="N", help="visits to each clip (default 9)")
    parser.flag("--seed", type=int, default=0, metavar="N", help="of weights, order and variations (default 0)")
    parser.flag(
        "--weights", type=Path, default=SHIPPED, metavar="FILE", help="where they go (default: the shipped ones)"
    )
    parser.flag("--json", type=Path, default=RESULTS, metavar="FILE", help="where the numbers go")
    return parser


if __name__ == "__main__":
    sys.exit(run(toy_classifier_command))
