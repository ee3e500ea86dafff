"""Training a low-rank change of a frozen UNet in place of its weights (LoRA: Hu et al. 2021, arXiv 2106.09685).

Every projection W of the UNet's attention becomes W + alpha / rank * B A. The change is added to what the projection
gives, from outside: the UNet, the names of its weights and their precision stay as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm import checkpoint
from vdm.components import fill_part, other_noise
from vdm.config import Config, to_yaml
from vdm.data.cache import Cache
from vdm.errors import UserError
from vdm.interop import StoredModel, open_model
from vdm.interop.lora import own_name
from vdm.interop.names import unet_links
from vdm.models import UNet3D, UNetConfig
from vdm.models.layers import zero_init
from vdm.training.task import UNetTask

# The projections of attention, by what is packed in them; each gets factors of its own.
PACKED = {"to_q": ("to_q",), "to_kv": ("to_k", "to_v"), "to_qkv": ("to_q", "to_k", "to_v"), "to_out": ("to_out",)}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the same in PEFT's words
# Keys in which a run may differ from the model that it changes: they are no matter of the weights.
FREE = ("dropout", "temporal_dropout", "max_num_frames", "attention_kernel")


class Factors(nn.Module):
    """A (rank, in_features) and B (out_features, rank), float32: A at random as in a linear layer, B zero."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = zero_init(nn.Linear(rank, out_features, bias=False))


class LoRA(nn.Module):
    """The factors of all projections of a UNet's attention, which that henceforth adds up.

    They are named as what they change, nothing packed: "encoder.0.spatial.block.attn1.to_q.lora_A.weight". At first
    they change nothing. Random numbers are drawn from `seed`. The UNet is in training mode when its factors are.
    """

    def __init__(self, unet: UNet3D, *, rank: int, alpha: float, seed: int):
        super().__init__()
        self._unet = (unet,)  # in a tuple it is no part of this module
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 2)  # else its first numbers were those of the UNet or the text tower
            for name, layer in unet.named_modules():
                home, _, last = name.rpartition(".")
                if last in PACKED and isinstance(layer, nn.Linear):
                    kinds = PACKED[last]
                    pieces = [Factors(layer.in_features, layer.out_features // len(kinds), rank) for _ in kinds]
                    for kind, piece in zip(kinds, pieces, strict=True):
                        _place(self, f"{home}.{kind}", piece)
                    layer.register_forward_hook(partial(_add_change, pieces, alpha / rank))

    def train(self, mode: bool = True) -> LoRA:
        self._unet[0].train(mode)
        return super().train(mode)


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make `module` the submodule `name` of `root`, with empty modules on the way to it."""
    *way, last = name.split(".")
    for step in way:
        if step not in dict(root.named_children()):
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    root.add_module(last, module)


def _add_change(
    pieces: Sequence[Factors], scale: float, _layer: nn.Module, inputs: tuple[Tensor], output: Tensor
) -> Tensor:
    """The output (..., out) of a projection of x (..., in), with scale * B A x of each packed piece added."""
    (x,) = inputs
    # One product by all A: under autocast each would cast x, and keep it, anew.
    down = F.linear(x, torch.cat([piece.lora_A.weight for piece in pieces]).to(x.dtype))
    parts = (scale * down).chunk(len(pieces), dim=-1)
    change = [F.linear(h, piece.lora_B.weight.to(h.dtype)) for h, piece in zip(parts, pieces, strict=True)]
    return output + torch.cat(change, dim=-1)


class LoRATask(UNetTask):
    """As a UNetTask, with a LoRA that learns in place of the UNet; a checkpoint holds the LoRA alone.

    The model that it is of is read from `training.init_from` at every start, its UNet kept as `training.weights_dtype`.
    """

    def __init__(self, config: Config, device: torch.device, *, cache: Cache | None = None):
        training = config.training
        assert training.init_from is not None and training.lora_rank is not None
        self.rank, self.alpha = training.lora_rank, training.lora_alpha or float(training.lora_rank)
        self.stored = open_model(training.init_from)
        _require_same(config, self.stored)  # before anything that takes time
        super().__init__(config, device, cache=cache)

    def fill(self, unet: UNet3D) -> str:
        """Give the UNet the weights that are to be changed; returns what tells them from others."""
        fill_part(unet, self.stored, "unet")
        return sample_of(unet)

    def build(self) -> dict[str, nn.Module]:
        modules = super().build()
        unet = modules["unet"]
        assert isinstance(unet, UNet3D)
        self.base = self.fill(unet)
        unet.to(torch.bfloat16 if self.config.training.weights_dtype == "bf16" else torch.float32)
        return {**modules, "lora": LoRA(unet, rank=self.rank, alpha=self.alpha, seed=self.config.seed)}

    def trained(self) -> dict[str, nn.Module]:
        return {"lora": self.modules["lora"]}

    def saved(self) -> dict[str, nn.Module]:
        return self.trained()

    def whole(self) -> dict[str, nn.Module]:
        return self.trained()

    def differentiated(self) -> dict[str, nn.Module]:
        return {"unet": self.modules["unet"], **self.trained()}

    def rounded(self) -> dict[str, nn.Module]:
        """The change is kept in float32, whatever the model is."""
        return {}

    def identity(self) -> dict[str, object]:
        return {"training.lora_alpha": self.alpha, "hash of training.init_from": self.base}

    def notes(self) -> dict[str, str]:
        settings = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": self.config.training.init_from,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": TARGETS,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        return {checkpoint.ADAPTER: json.dumps(settings, indent=2) + "\n"}

    def start_from(self, path: Path) -> None:
        """The model was read when it was built, and its change starts at nothing."""

    def came_from(self, path: Path) -> None:
        """No part of the model is in a checkpoint."""

    def write_final(
        self, path: Path, config: Config, weights: Mapping[str, Mapping[str, Tensor]], info: Mapping[str, object]
    ) -> None:
        """Write the LoRA as PEFT does, `adapter_model.safetensors` and `adapter_config.json`."""
        checkpoint.save_checkpoint(
            path,
            config_yaml=to_yaml(config),
            weights={"adapter_model": peft_state(weights["lora"], config.model)},
            info={**info, **self.identity()},
            notes=self.notes(),
        )


def peft_state(factors: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The factors under PEFT's names, which are those of diffusers' UNet."""
    theirs = {
        own_name(link, index): name.removesuffix(".weight")
        for link in unet_links(config, "diffusers")
        for index, name in enumerate(link.theirs)
    }
    state = {}
    for name, tensor in factors.items():
        layer, _, factor = name.partition(".lora_")
        state[f"base_model.model.{theirs[layer]}.lora_{factor}"] = tensor
    return state


def sample_of(unet: UNet3D) -> str:
    """A short SHA-256 of a UNet's names, shapes and the first row of every tensor, as float32.

    It takes no time, no other training of the same model has it, and it is the same in every layout.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor[:1].detach().cpu().float().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _require_same(config: Config, stored: StoredModel) -> None:
    """The model that is changed, and the noise that it knows, are what the config says, for sampling will go by it.

    Raises UserError that names the first key that differs.
    """
    ours, theirs = asdict(config.model), asdict(stored.config.model)
    differ = [(f"model.{key}", ours[key], theirs[key]) for key in ours if key not in FREE and ours[key] != theirs[key]]
    differ += [(key, *values) for key, values in other_noise(config, stored).items()]
    if differ:
        key, value, wanted = differ[0]
        shown, theirs_is = (repr(one)[:60] for one in (value, wanted))
        raise UserError(f"{key} is {shown}, but {stored.path}, which this LoRA is to change, has {theirs_is}; use that")
