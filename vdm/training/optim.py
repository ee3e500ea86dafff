"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from vdm.training.settings import TrainingConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over all parameters alike, as the reference recipe has it."""
    return torch.optim.AdamW(
        [p for p in parameters if p.requires_grad],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Rate of step `step` (from 0): linear warm-up, then a cosine to zero at `max_train_steps`, or constant."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_scheduler == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.max_train_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
