"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vdm.training.adam import AdamW
from vdm.training.muon import Muon
from vdm.training.settings import TrainingConfig


def build_optimizer(modules: Iterable[nn.Module], config: TrainingConfig, *, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over all parameters alike, as the reference recipe has it, or Muon.

    `seed` is that of stochastic rounding, where weights or moments are kept in less than float32.
    """
    modules = list(modules)
    learn = [p for module in modules for p in module.parameters() if p.requires_grad]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        if needs_own_adamw(config):
            return AdamW(learn, **settings, states=config.optimizer_states, seed=seed)
        return torch.optim.AdamW(learn, **settings)
    matrices = {id(p) for module in modules for p in _matrices(module)}
    return Muon([p for p in learn if id(p) in matrices], [p for p in learn if id(p) not in matrices], **settings)


def needs_own_adamw(config: TrainingConfig) -> bool:
    """Whether PyTorch's AdamW, whose steps take fewer and larger kernels, cannot do what the config asks for."""
    return config.optimizer_states != "fp32" or config.weights_dtype == "bf16" or config.optimizer_in_backward


def _matrices(module: nn.Module) -> Iterable[nn.Parameter]:
    """Weights that map vectors to vectors: neither tables of embeddings nor what has one axis."""
    for layer in module.modules():
        for name, p in layer.named_parameters(recurse=False):
            if name.endswith("weight") and p.ndim > 1 and not isinstance(layer, nn.Embedding):
                yield p


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Rate of step `step` (from 0): linear warm-up, then a cosine to zero at `max_train_steps`, or constant."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_scheduler == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.max_train_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
