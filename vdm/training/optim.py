"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from vdm.training.adam import AdamW
from vdm.training.groups import Group, optimizer_groups
from vdm.training.limits import Limits
from vdm.training.muon import Muon
from vdm.training.settings import TrainingConfig


def build_optimizer(
    modules: Mapping[str, nn.Module], config: TrainingConfig, *, seed: int = 0
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) or Muon over all parameters that learn, alike but for their learning rates.

    A group has a `name` and its `rate`, which is that at the height of the schedule; see `groups.Group`. `seed` is that
    of stochastic rounding, where weights or moments are kept in less than float32.
    """
    groups = optimizer_groups(modules, config)
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        learn = [_as_dict(group, group.parameters.values()) for group in groups]
        if needs_own_adamw(config):
            return AdamW(learn, **settings, states=config.optimizer_states, seed=seed)
        return torch.optim.AdamW(learn, **settings, fused=True)
    matrices = {id(p) for module in modules.values() for p in _matrices(module)}
    split: list[dict[str, Any]] = []
    for group in groups:
        for kind in (True, False):
            alike = [p for p in group.parameters.values() if (id(p) in matrices) is kind]
            split += [{**_as_dict(group, alike), "matrices": kind}] if alike else []
    return Muon(split, **settings, within=torch.bfloat16 if config.mixed_precision == "bf16" else None)


def _as_dict(group: Group, parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
    return {"params": list(parameters), "lr": group.rate, "name": group.name, "rate": group.rate}


def needs_own_adamw(config: TrainingConfig) -> bool:
    """Whether PyTorch's AdamW, whose steps take fewer and larger kernels, cannot do what the config asks for."""
    return config.optimizer_states != "fp32" or config.weights_dtype == "bf16" or config.optimizer_in_backward


def _matrices(module: nn.Module) -> Iterable[nn.Parameter]:
    """Weights that map vectors to vectors: neither tables of embeddings nor what has one axis."""
    for layer in module.modules():
        for name, p in layer.named_parameters(recurse=False):
            if name.endswith("weight") and p.ndim > 1 and not isinstance(layer, nn.Embedding):
                yield p


def learning_rate(step: int, config: TrainingConfig, *, done: float | None = None) -> float:
    """Rate of step `step` (from 0), where `learning_rate` applies: a linear warm-up, then a decay to
    `min_learning_rate`, or constant.

    `done` in [0, 1] is the share of the run after its warm-up that is over (see `Limits.done`); None is that of a run
    that `max_train_steps` ends. "cosine" and "linear" decay all the while, "wsd" (arXiv 2404.06395, section 4) stays
    at the height and falls in a line within the last `decay_share`.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_scheduler == "constant":
        return config.learning_rate
    if done is None:
        done = Limits(config.max_train_steps).done(step, warmup=config.warmup_steps)
    height, end = config.learning_rate - config.min_learning_rate, config.min_learning_rate
    if config.lr_scheduler == "cosine":
        return end + height * 0.5 * (1.0 + math.cos(math.pi * done))
    share = config.decay_share if config.lr_scheduler == "wsd" else 1.0
    return end + height * min(1.0, (1.0 - done) / share if share else 1.0)
