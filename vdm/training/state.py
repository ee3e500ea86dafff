"""All that a run consists of at a step, whole whatever number of processes share it: taken, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdm import checkpoint, dist
from vdm.errors import UserError
from vdm.training.groups import names_in_order, reordered

if TYPE_CHECKING:
    from vdm.training.trainer import Trainer

States = dict[str, Mapping[str, Tensor]]


def all_weights(trainer: Trainer) -> States:
    """The weights of all parts of the model, and the averages of those that learn as `<part>.ema`."""
    for module in trainer.trained.values():
        dist.unite_flags(module)
    averages = {f"{part}.ema": dist.whole(trainer.ema.state_dict(part)) for part in trainer.trained}
    return _weights(trainer) | averages


def finished_weights(trainer: Trainer) -> States:
    """The weights of all parts of the model, averaged where they learn."""
    return _weights(trainer) | {part: dist.whole(trainer.ema.state_dict(part)) for part in trainer.trained}


def _weights(trainer: Trainer) -> States:
    # Parts that training does without are nobody's but the one's that writes them.
    parts = trainer.task.whole() if dist.is_main() else trainer.task.saved()
    return {part: dist.whole(module.state_dict()) for part, module in parts.items()}


def training_state(trainer: Trainer) -> dict[str, Any]:
    """What a resumed run needs beside the weights: tensors and plain values."""
    return {
        "optimizer": dist.whole(trainer.optimizer.state_dict()),
        "learns": names_in_order(trainer.optimizer, trainer.trained),
        "scaler": trainer.scaler.state_dict(),
        "ema_updates": trainer.ema.num_updates,
        "faults": asdict(trainer.faults),
        "in_backward": None if trainer.in_backward is None else trainer.in_backward.state_dict(),
    }


def load_state(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Take weights, optimizer, scaler and averages from a checkpoint; returns what `training_state` gave.

    Raises UserError where they do not fit.
    """
    state = checkpoint.load_trainer_state(path)
    # Frozen parts too: what they were first made from may have changed, or be gone.
    for part, module in trainer.task.saved().items():
        try:
            weights = checkpoint.load_weights(path, part)
            ours = module.state_dict()
            module.load_state_dict({n: dist.share_of(t, like=ours.get(n, t)) for n, t in weights.items()})
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"the {part} weights in {path} do not fit this config: {reason}") from error
    _load_optimizer(trainer, state, path)
    if state["scaler"]:  # empty where the run was not in float16
        trainer.scaler.load_state_dict(state["scaler"])
    if trainer.in_backward is not None:
        trainer.in_backward.load_state_dict(state.get("in_backward") or {"last_norm": None})
    averages = {part: checkpoint.load_weights(path, f"{part}.ema") for part in trainer.trained}
    trainer.ema.load(averages, num_updates=state["ema_updates"])
    return state


def _load_optimizer(trainer: Trainer, state: Mapping[str, Any], path: Path) -> None:
    """The moments are the checkpoint's; rates, weight decay and the like are what this run's config says."""
    optimizer = trainer.optimizer
    ours = names_in_order(optimizer, trainer.trained)
    theirs = state.get("learns", ours)
    if differ := sorted({*ours} ^ {*theirs}):
        raise UserError(
            f"{path} is of a run in which other layers are frozen ({differ[0]} is one of {len(differ)}); set "
            "those of training.spatial_, temporal_ and text_learning_rate to 0 that were, or begin a run from "
            "its weights with training.init_from"
        )
    numbered = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {name: _moment(value, like=numbered[number]) for name, value in moment.items()}
        for number, moment in reordered(state["optimizer"]["state"], theirs=theirs, ours=ours).items()
    }
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _moment(value: Tensor, *, like: nn.Parameter) -> Tensor:
    """This process's share of a moment, its numbers in memory in the order of its weight's."""
    share = dist.share_of(value, like=like)
    if share.shape != like.shape or share.stride() == like.stride():
        return share
    # Fused kernels go through both as they lie; processes that shared weights out have written other orders.
    return torch.empty_like(like, dtype=share.dtype, device=share.device, requires_grad=False).copy_(share)
