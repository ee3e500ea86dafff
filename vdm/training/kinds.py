"""Which kind of training a config asks for."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch

from vdm.config import Config
from vdm.data.cache import Cache
from vdm.errors import UserError
from vdm.training.cached import reads_text
from vdm.training.lora import LoRATask
from vdm.training.pretraining import TextTask, VAETask
from vdm.training.task import Task, UNetTask


def random_parts(config: Config) -> list[str]:
    """The keys that name no weights for parts which a new run would never train."""
    frozen: dict[str, str | None] = {}
    if config.training.task != "vae":
        frozen["vae.vae_weights"] = config.vae.vae_weights
    if reads_text(config):
        frozen["text.text_weights"] = config.text.text_weights
    return [key for key, weights in frozen.items() if weights is None]


def warn_of_random_parts(config: Config) -> None:
    """Name them."""
    for key in random_parts(config):
        print(f"warning: {key} is null, so this run trains on a random, frozen network", file=sys.stderr)


TASKS: Mapping[str, type[Task]] = {"unet": UNetTask, "vae": VAETask, "text": TextTask}


def build_task(config: Config, device: torch.device, *, cache: Cache | None = None) -> Task:
    """The task that `training.task` names, with `cache` in place of the one in `data.cache_dir`, where it is given.

    Raises `UserError` where the device cannot do the precision asked for.
    """
    if config.training.mixed_precision == "fp16" and device.type != "cuda":
        raise UserError("training.mixed_precision=fp16 needs a CUDA device; use bf16 or no on this machine")
    if config.training.lora_rank is not None:
        return LoRATask(config, device, cache=cache)
    kind = TASKS[config.training.task]
    return kind(config, device) if cache is None else kind(config, device, cache=cache)  # type: ignore[call-arg]
