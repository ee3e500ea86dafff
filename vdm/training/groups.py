"""Which parameters are about time: one answer for all that treats them apart. How fast each learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vdm.errors import UserError
from vdm.training.settings import TrainingConfig


def is_temporal(name: str) -> bool:
    """Whether a parameter of a UNet or a VAE, by its name there, is of a layer that mixes frames."""
    parts = name.split(".")
    between_frames = "temporal_conv" in parts or "temporal" in parts
    return between_frames or parts[0] == "transformer_in" or parts[:2] == ["decoder", "time"]


def group_of(part: str, name: str) -> str:
    """The group of a parameter of a part of the model: "spatial", "temporal", or the part itself where it has none."""
    if part not in ("unet", "vae", "lora"):
        return part
    return "temporal" if is_temporal(name) else "spatial"


@dataclass(frozen=True)
class Group:
    """Parameters by their names `part.name`, in the order of the modules, and their learning rate at its height.

    `name` is "" for those that `learning_rate` is of, else `spatial`, `temporal` or `text`.
    """

    name: str
    rate: float
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


def own_rates(config: TrainingConfig) -> dict[str, float]:
    """The learning rates that differ from `learning_rate` by name; 0 freezes."""
    rates = {
        "spatial": config.spatial_learning_rate,
        "temporal": config.temporal_learning_rate,
        "text": config.text_learning_rate,
    }
    return {name: rate for name, rate in rates.items() if rate is not None}


def _rate_of(part: str, name: str, rates: Mapping[str, float]) -> str:
    """The name of the learning rate of a parameter."""
    group = group_of(part, name)
    return group if group in rates else ""


def choose_what_learns(modules: Mapping[str, nn.Module], config: TrainingConfig) -> None:
    """Let the parameters of the trained parts learn, but for those whose rate is 0: these are frozen.

    Raises UserError where a rate is of parameters that are not there, or none is left to learn.
    """
    rates, learns = own_rates(config), False
    found: set[str] = set()
    for part, module in modules.items():
        for name, parameter in module.named_parameters():
            group = _rate_of(part, name, rates)
            found.add(group)
            parameter.requires_grad_(rates.get(group, config.learning_rate) > 0)
            learns |= parameter.requires_grad
    for name in rates:
        if name not in found and not (name == "text" and rates[name] == 0):  # a frozen text tower is not among them
            raise UserError(f"training.{name}_learning_rate is set, but this run trains no such layers; leave it out")
    if not learns:
        raise UserError("every layer is frozen; set one of the training.*_learning_rate above 0")


def optimizer_groups(modules: Mapping[str, nn.Module], config: TrainingConfig) -> list[Group]:
    """What learns, by learning rate; without rates of their own all parameters are one group."""
    rates = own_rates(config)
    groups: dict[str, Group] = {}
    for part, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                kind = _rate_of(part, name, rates)
                group = groups.setdefault(kind, Group(kind, rates.get(kind, config.learning_rate)))
                group.parameters[f"{part}.{name}"] = parameter
    return list(groups.values())


def names_in_order(optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> list[str]:
    """The names of an optimizer's parameters, `part.name`, in the order in which its state numbers them."""
    names = {id(p): f"{part}.{name}" for part, module in modules.items() for name, p in module.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def reordered(moments: Mapping[int, Any], *, theirs: list[str], ours: list[str]) -> dict[int, Any]:
    """The `state` of an optimizer's state dict under the numbers of one that has the same parameters in another order.

    Groups, and with them the order, follow the learning rates, and those may change when a run is resumed.
    """
    assert sorted(theirs) == sorted(ours), "the same parameters learn"
    by_name = {theirs[number]: state for number, state in moments.items()}
    return {number: by_name[name] for number, name in enumerate(ours) if name in by_name}
