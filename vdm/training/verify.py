"""`train.py --verify_resume`: does this config go on, on this machine, as if it had never stopped?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vdm import checkpoint
from vdm.config import Config
from vdm.errors import Failure, UserError
from vdm.training.loop import train

STEPS = 3  # of each half


def verify_resume(config: Config) -> None:
    """Train 2N steps at a stretch, and N, a restart and N more, in folders of their own that vanish afterwards.

    Learning rates, clips and all draws are those of the real run's first steps. Raises Failure that names what differs.
    """
    steps = min(STEPS, config.training.max_train_steps // 2)
    if steps < 1:
        raise UserError("training.max_train_steps=1 cannot be halved; set it to 2 or more")
    parent = Path(config.run_dir).parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".verify-resume-", dir=parent) as folder:
        whole, halves = Path(folder) / "whole", Path(folder) / "halves"
        left = train(_run(config, whole, stop=2 * steps))
        train(_run(config, halves, stop=steps))
        right = train(_run(config, halves, stop=2 * steps), resume="latest")
        differ = list(differences(left, right))
    if differ:
        raise Failure(
            f"after {2 * steps} steps with a restart amid them {len(differ)} things differ: {differ[0]} first"
        )
    print(f"{steps} steps, a restart and {steps} more are {2 * steps} steps, bit for bit")


def _run(config: Config, run_dir: Path, *, stop: int) -> Config:
    """The run with nothing but steps, to end after `stop` of them; with a clock no two runs were alike."""
    most = config.training.max_train_steps
    training = replace(
        config.training,
        stop_after_steps=None if stop == most else stop,
        max_train_hours=None,
        checkpointing_steps=stop,
        keep_checkpoints=None,
        validation_steps=0,
        preview_steps=0,
        rehearsal=False,
    )
    return replace(config, run_dir=str(run_dir), training=training)


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
