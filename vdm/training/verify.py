"""`train.py --verify_resume`: does this config go on, on this machine, as if it had never stopped?"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vdm import checkpoint, dist
from vdm.config import Config
from vdm.errors import Failure
from vdm.training.loop import train

STEPS = 3  # of each half


def verify_resume(config: Config) -> None:
    """Train 2N steps at a stretch, and N, a restart and N more, in folders of their own that vanish afterwards.

    Clips and all draws are those of the real run's first steps, and so are learning rates but for limits of epochs and
    hours, which are left out. Raises Failure that names what differs, or that it was interrupted.
    """
    parent = Path(config.run_dir).parent
    with dist.together():
        made = ""
        if dist.is_main():
            parent.mkdir(parents=True, exist_ok=True)
            made = tempfile.mkdtemp(prefix=".verify-resume-", dir=parent)
        folder = Path(dist.from_main(made))
        try:
            left = _trained(config, folder / "whole", stop=2 * STEPS)
            _trained(config, folder / "halves", stop=STEPS)
            right = _trained(config, folder / "halves", stop=2 * STEPS, resume="latest")
            differ = dist.from_main(list(differences(left, right)) if dist.is_main() else [])
        finally:
            if dist.is_main():
                shutil.rmtree(folder, ignore_errors=True)
    if differ:
        raise Failure(
            f"after {2 * STEPS} steps with a restart amid them {len(differ)} things differ: {differ[0]} first"
        )
    if dist.is_main():
        print(f"{STEPS} steps, a restart and {STEPS} more are {2 * STEPS} steps, bit for bit")


def _trained(config: Config, run_dir: Path, *, stop: int, resume: str | None = None) -> Path:
    """The checkpoint after `stop` steps of a run with nothing but steps, which is to go on for longer."""
    training = replace(
        config.training,
        max_train_steps=max(config.training.max_train_steps, 2 * STEPS + 1),
        max_train_epochs=None,
        max_train_hours=None,
        stop_after_steps=stop,
        checkpointing_steps=stop,
        keep_checkpoints=None,
        validation_steps=0,
        preview_steps=0,
        rehearsal=False,
    )
    reached = train(replace(config, run_dir=str(run_dir), training=training), resume=resume)
    if reached.name != f"checkpoint-{stop}":
        raise Failure("it was interrupted before it could compare anything")
    return reached


def differences(left: Path, right: Path) -> Iterator[str]:
    """What differs between two checkpoints: tensors by name, and the trainer's state."""
    parts = sorted({*checkpoint.read_manifest(left).parts, *checkpoint.read_manifest(right).parts})
    for part in parts:
        ours, theirs = checkpoint.load_weights(left, part), checkpoint.load_weights(right, part)
        for name in sorted({*ours, *theirs}):
            if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name]):
                yield f"{part}.{name}"
    if checkpoint.TRAINER in checkpoint.read_manifest(left).files:
        yield from _unequal(checkpoint.load_trainer_state(left), checkpoint.load_trainer_state(right), "trainer")


def _unequal(left: object, right: object, name: str) -> Iterator[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in {**left, **right}:
            yield from _unequal(left.get(key), right.get(key), f"{name}.{key}")
    elif isinstance(left, Tensor) and isinstance(right, Tensor):
        if not torch.equal(left, right):
            yield name
    elif left != right:
        yield name
