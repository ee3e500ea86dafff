"""LoRA files (Hu et al. 2021, arXiv 2106.09685) of this UNet and its text tower, merged into the weights.

Tensors are named as PEFT, diffusers (of any age) and Kohya's scripts name them, after diffusers' names of the layers.
The merged weight is W + scale * alpha / r * B A, for linear layers and convolutions alike.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdm.checkpoint import ADAPTER, MANIFEST, checked_file
from vdm.errors import UserError
from vdm.files import is_file
from vdm.interop.links import Link
from vdm.interop.model import making_sense_of, read_json
from vdm.interop.names import text_links, unet_links
from vdm.models import UNet3D
from vdm.text.encoder import TextEncoder
from vdm.weights import Weights, open_weights, read_metadata

FILES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
    "lora.ema.safetensors",  # of a checkpoint of a run that trains one
)
# Parts, by what names of theirs begin with; PEFT's own files of one module do not say which it is.
_PREFIXES = {
    "unet": ("base_model.model.unet.", "unet.", "lora_unet_", "base_model.model.", ""),
    "text": ("base_model.model.text_encoder.", "text_encoder.", "lora_te_", "lora_te1_", "base_model.model.", ""),
}
# How the two factors are marked, oldest last: PEFT, Kohya, diffusers, diffusers' text tower, its attention processors.
_MARKS = (
    (r"\.lora_A(?:\.\w+)?\.weight$", r"\.lora_B(?:\.\w+)?\.weight$"),
    (r"\.lora_down\.weight$", r"\.lora_up\.weight$"),
    (r"\.lora\.down\.weight$", r"\.lora\.up\.weight$"),
    (r"\.lora_linear_layer\.down\.weight$", r"\.lora_linear_layer\.up\.weight$"),
    (r"_lora\.down\.weight$", r"_lora\.up\.weight$"),
)


@dataclass
class _Update:
    """What a file says of one layer."""

    down: str | None = None  # names of its tensors in the file
    up: str | None = None
    alpha: str | None = None


def merge_lora(unet: UNet3D, text_encoder: TextEncoder, path: str | Path, *, scale: float = 1.0) -> int:
    """Add a LoRA, `scale` times, to the weights of the layers it is of; returns how many those are.

    `path` is a .safetensors (or .bin) file, or a folder with one. Raises `UserError`, before anything is changed, where
    a tensor is not of this model, has no counterpart or another shape.
    """
    if not isinstance(scale, float | int) or not math.isfinite(scale):
        raise UserError(f"the scale of a LoRA must be a finite number, got {scale!r}")
    file = _file(Path(path))
    layers = {**_layers(unet, "unet"), **_layers(text_encoder, "text")}
    changes = []
    with making_sense_of(file):
        weights, settings = open_weights(file), _settings(file)
        for layer, update in _updates(file, weights, layers).items():
            link, index, module = layers[layer]
            target = module.get_parameter(link.ours).detach().chunk(len(link.theirs))[index]
            down, up = _factors(file, weights, update, target)
            strength = scale * _strength(layer, update, weights, settings)
            delta = (strength * (up.float().flatten(1) @ down.float().flatten(1))).reshape(target.shape).to(target)
            if not delta.isfinite().all():
                raise UserError(f"{file}: {update.down} and {update.up} make numbers that are not finite")
            changes.append((target, delta))
    with torch.no_grad():
        for target, delta in changes:
            target.add_(delta)
    return len(changes)


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"LoRA {path} does not exist")
    named = [path / name for name in FILES if (path / name).is_file()]
    others = sorted(path.glob("*.safetensors"))
    if not named and len(others) != 1:
        raise UserError(
            f"{path} holds {len(others)} .safetensors files and none named {FILES[0]}; name the file itself"
        )
    if is_file(path / MANIFEST):  # one of our own, which says what its files are
        return checked_file(path, (named or others)[0].name)
    return (named or others)[0]


def _layers(module: nn.Module, part: str) -> dict[str, tuple[Link, int, nn.Module]]:
    """From "part layer" to the link that has its weight, which piece of it that is, and the module it is in."""
    if isinstance(module, UNet3D):
        links = unet_links(module.config, "diffusers")
    else:
        assert isinstance(module, TextEncoder)
        links = text_links(module.config, "transformers")
    return {
        f"{part} {name.removesuffix('.weight')}": (link, index, module)
        for link in links
        for index, name in enumerate(link.theirs)
        if name.endswith(".weight")
    }


def own_name(link: Link, index: int) -> str | None:
    """What training calls the projection of attention that `link.theirs[index]` is: ours, with nothing packed.

    Such as "encoder.0.spatial.block.attn1.to_q", or None for a layer that is no such projection.
    """
    kind = re.search(r"\.(to_(?:q|k|v|out))(?:\.0)?\.weight$", link.theirs[index])
    return kind and f"{link.ours.rsplit('.', 2)[0]}.{kind[1]}"


def _updates(file: Path, weights: Weights, layers: Mapping[str, tuple[Link, int, nn.Module]]) -> dict[str, _Update]:
    """The tensors of a file, by the layer of ours that they are of."""
    flat = {layer.replace(".", "_"): layer for layer in layers}  # Kohya's names
    for layer, (link, index, _) in layers.items():
        if own := own_name(link, index):
            flat[f"unet {_with_index(own)}".replace(".", "_")] = layer
    updates: dict[str, _Update] = {}
    for name in weights:
        kind, layer = _kind(name)
        found = _layer(layer, flat)
        if re.search(r"(dora_scale|lora_magnitude_vector|bias|modules_to_save)", name):
            raise UserError(f"{file}: {name} is more than the two factors of a LoRA; merge it with PEFT first")
        if kind is None or found is None:
            raise UserError(f"{file}: {name} is no LoRA of a layer of this model; give a LoRA of a ModelScope UNet")
        update = updates.setdefault(found, _Update())
        if other := getattr(update, kind):
            raise UserError(f"{file}: {other} and {name} are of one layer; give a file with one LoRA")
        setattr(update, kind, name)
    if not updates:
        raise UserError(f"{file} holds no tensors; give a LoRA of a ModelScope UNet")
    return updates


def _layer(name: str, flat: Mapping[str, str]) -> str | None:
    """The layer of ours that a file calls `name`, be it by dots or underscores."""
    for part, prefixes in _PREFIXES.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                rest = re.sub(r"\.processor\.(\w+)$", r".\1", name.removeprefix(prefix))
                rest = _with_index(rest)
                # Text towers of transformers 5 have no prefix of their own.
                for one in (rest, f"text_model.{rest}"):
                    if (found := flat.get(f"{part} {one}".replace(".", "_"))) is not None:
                        return found
    return None


def _with_index(layer: str) -> str:
    """to_out -> to_out.0, as diffusers has it."""
    return re.sub(r"\.to_out$", ".to_out.0", layer)


def _kind(name: str) -> tuple[str | None, str]:
    """("down" | "up" | "alpha" | None, the layer)."""
    for down, up in _MARKS:
        for kind, pattern in (("down", down), ("up", up)):
            if re.search(pattern, name):
                return kind, re.sub(pattern, "", name)
    return ("alpha", name.removesuffix(".alpha")) if name.endswith(".alpha") else (None, name)


def _factors(file: Path, weights: Weights, update: _Update, target: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, in, ...) and B (out, r, ...) of one layer."""
    if update.down is None or update.up is None:
        there = update.down or update.up or update.alpha
        raise UserError(f"{file}: {there} has no counterpart, and a LoRA is a product of two; copy the file again")
    down, up = weights[update.down], weights[update.up]
    fits = (
        len(down)
        and up.dim() >= 2
        and down.dim() >= 2
        and up[0].numel() == down.shape[0]
        and up.shape[0] == target.shape[0]
    )
    if not fits or down[0].numel() != target[0].numel():
        shapes = f"{update.down} {tuple(down.shape)} and {update.up} {tuple(up.shape)}"
        raise UserError(f"{file}: {shapes} do not make a {tuple(target.shape)}; give a LoRA of a model of this size")
    return down, up


def _settings(file: Path) -> dict[str, Any]:
    """PEFT's settings: beside the file, or in its header where diffusers puts them, as "unet.lora_alpha"."""
    beside = file.with_name(ADAPTER)
    noted = json.loads(read_metadata(file).get("lora_adapter_metadata", "{}"))
    settings = {**(read_json(beside) if beside.is_file() else {}), **noted}
    for key, value in settings.items():
        if key.endswith("use_dora") and value:
            raise UserError(
                f"{file} is a DoRA, of which the magnitudes cannot be merged here; merge it with PEFT first"
            )
        # These change the weights that they start from.
        if key.endswith("init_lora_weights") and str(value).lower().startswith(("pissa", "olora", "corda", "loftq")):
            raise UserError(f"{file} was begun with {value}, which changes the model itself; merge it with PEFT first")
    return settings


def _strength(layer: str, update: _Update, weights: Weights, settings: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732); 1 where no alpha is given."""
    assert update.down is not None
    rank = weights.specs[update.down].shape[0]
    part, _, name = layer.partition(" ")
    prefix = {"unet": "unet.", "text": "text_encoder."}[part]

    def setting(key: str, default: Any) -> Any:
        return settings.get(prefix + key, settings.get(key, default))

    alpha = setting("lora_alpha", rank)
    patterns = (setting("alpha_pattern", None) or {}).items()
    alpha = next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", name)), alpha)
    if update.alpha is not None:
        alpha = float(weights[update.alpha])
    return float(alpha) / (math.sqrt(rank) if setting("use_rslora", False) else rank)
