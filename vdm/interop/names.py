"""What the other layouts call each tensor of ours.

"diffusers" and "transformers" are the names in a diffusers folder; "modelscope" those of the original's UNet (with its
`temopral_conv`); "ldm" those of latent diffusion's own files, which are the original's but for time; "open_clip" is
ours. Where theirs keeps queries, keys and values apart, ours packs them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vdm.interop.links import Link
from vdm.models import UNet3D, UNetConfig, VAEConfig, VideoVAE
from vdm.text.encoder import TextConfig, TextEncoder

UNetLayout = Literal["diffusers", "modelscope", "ldm"]

# Names of layers within a block.
_DIFFUSERS_RES = {"emb": "time_emb_proj", "shortcut": "conv_shortcut"}
_LDM_RES = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "emb": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "shortcut": "skip_connection",
}  # fmt: skip
_TRANSFORMER = {
    "block": "transformer_blocks.0", "to_out": "to_out.0", "linear1": "net.0.proj", "linear2": "net.2",
}  # fmt: skip
_OPEN_CLIP_TO_TRANSFORMERS = {
    "transformer.resblocks": "encoder.layers", "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn": "self_attn",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "ln_final": "final_layer_norm",
    "token_embedding": "embeddings.token_embedding",
}  # fmt: skip


def unet_tensors(config: UNetConfig) -> dict[str, Tensor]:
    """Our tensors, on the meta device."""
    with torch.device("meta"):
        return UNet3D(replace(config, attention_kernel="sdpa")).state_dict()


def vae_tensors(config: VAEConfig) -> dict[str, Tensor]:
    """Our tensors, on the meta device."""
    with torch.device("meta"):
        return VideoVAE(config).state_dict()


def text_tensors(config: TextConfig) -> dict[str, Tensor]:
    """Our tensors, on the meta device; the tower's and the record of the tokens seen."""
    with torch.device("meta"):
        return TextEncoder(config).state_dict()


def unet_links(config: UNetConfig, layout: UNetLayout) -> list[Link]:
    """How our UNet's tensors are stored in `layout`; "ldm" is an image model's, without the temporal layers.

    A diffusers image model has the names of its video model.
    """
    places = _diffusers_blocks(config) if layout == "diffusers" else _original_blocks(config, video=layout != "ldm")
    links = []
    for name, tensor in unet_tensors(config).items():
        place = _prefix(name, places)
        if place is None:
            continue
        theirs = places[place] + _within_unet_block(name.removeprefix(place), place, layout)
        # The original projects into temporal attention by 1x1 convolutions over frames.
        as_conv = layout == "modelscope" and re.search(r"(transformer_in|\.temporal)\.proj_\w+\.weight$", name)
        links.append(Link(name, _unpacked(theirs), (1,) if as_conv else ()))
        assert tensor.dim() == 2 or not as_conv
    return links


def _prefix(name: str, places: Mapping[str, str]) -> str | None:
    """The longest of our block names that `name` is in."""
    return max((ours for ours in places if name.startswith(f"{ours}.")), key=len, default=None)


def _diffusers_blocks(config: UNetConfig) -> dict[str, str]:
    places = {
        "time_embedding.linear1": "time_embedding.linear_1", "time_embedding.linear2": "time_embedding.linear_2",
        "conv_in": "conv_in", "transformer_in": "transformer_in", "norm_out": "conv_norm_out", "conv_out": "conv_out",
    }  # fmt: skip
    kinds = {"res": "resnets", "temporal_conv": "temp_convs", "spatial": "attentions", "temporal": "temp_attentions"}

    def layer(ours: str, theirs: str, index: int) -> None:
        places.update({f"{ours}.{kind}": f"{theirs}.{name}.{index}" for kind, name in kinds.items()})

    depth = config.num_res_blocks
    for level in range(len(config.channel_mult)):
        first = level * (depth + 1)
        for i in range(depth):
            layer(f"encoder.{first + i}", f"down_blocks.{level}", i)
        places[f"encoder.{first + depth}.conv"] = f"down_blocks.{level}.downsamplers.0.conv"
        for i in range(depth + 1):
            layer(f"decoder.{first + i}.layer", f"up_blocks.{level}", i)
        # Theirs comes up at the end of a level, ours at the start of the next.
        places[f"decoder.{first + depth + 1}.upsample.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    layer("middle.0", "mid_block", 0)
    layer("middle.1", "mid_block", 1)
    return places


def _original_blocks(config: UNetConfig, *, video: bool) -> dict[str, str]:
    places = {
        "time_embedding.linear1": "time_embed.0", "time_embedding.linear2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2",
    }  # fmt: skip
    if video:
        places["transformer_in"] = "input_blocks.0.1"

    def layer(ours: str, theirs: str) -> None:
        places.update({f"{ours}.res": f"{theirs}.0", f"{ours}.spatial": f"{theirs}.1"})
        if video:
            places.update({f"{ours}.temporal_conv": f"{theirs}.0.temopral_conv", f"{ours}.temporal": f"{theirs}.2"})

    depth, levels = config.num_res_blocks, config.attention_levels
    for level, attention in enumerate(levels):
        first = level * (depth + 1)
        for i in range(depth):
            layer(f"encoder.{first + i}", f"input_blocks.{first + i + 1}")
        places[f"encoder.{first + depth}.conv"] = f"input_blocks.{first + depth + 1}" + (".op" if video else ".0.op")
        for i in range(depth + 1):
            layer(f"decoder.{first + i}.layer", f"output_blocks.{first + i}")
        # Theirs comes up at the end of a level, after its attention; ours at the start of the next.
        attention = levels[::-1][level]
        position = (3 if video else 2) if attention else 1
        places[f"decoder.{first + depth + 1}.upsample.conv"] = f"output_blocks.{first + depth}.{position}.conv"
    layer("middle.0", "middle_block")
    places["middle.1.res"] = f"middle_block.{3 if video else 2}"
    if video:
        places["middle.1.temporal_conv"] = "middle_block.3.temopral_conv"
    return places


def _within_unet_block(rest: str, block: str, layout: UNetLayout) -> str:
    """What `layout` calls the rest of a name in our `block`."""
    if block.endswith(".res"):
        return _replaced(rest, _DIFFUSERS_RES if layout == "diffusers" else _LDM_RES)
    if not block.endswith(".temporal_conv"):
        return _replaced(rest, _TRANSFORMER)
    kind, index, parameter = rest.removeprefix(".").split(".")
    position = 0 if kind == "norms" else 3 if int(index) else 2  # behind norm, SiLU and, but for the first, dropout
    return f".conv{int(index) + 1}.{position}.{parameter}"


def _replaced(name: str, changes: Mapping[str, str]) -> str:
    for ours, theirs in changes.items():
        name = re.sub(rf"(?<=\.){ours}(?=\.)", theirs, name)
    return name


def _unpacked(name: str) -> tuple[str, ...]:
    """to_qkv -> to_q, to_k, to_v; to_kv -> to_k, to_v."""
    packed = re.search(r"to_(qkv|kv)\.", name)
    return tuple(name.replace(packed[0], f"to_{kind}.") for kind in packed[1]) if packed else (name,)


def vae_links(config: VAEConfig, layout: Literal["diffusers", "ldm"]) -> list[Link]:
    """How our autoencoder's tensors are stored in `layout`; its temporal layers have no place there."""
    places = _vae_layers(config)
    links = []
    for name, tensor in vae_tensors(config).items():
        place = _prefix(name, places)
        if place is None:
            continue
        theirs = places[place] + name.removeprefix(place)
        if layout == "ldm":
            names = _ldm_vae_names(theirs, len(config.vae_channels))
            links.append(Link(name, names, (1, 1) if ".attn_1." in names[0] and tensor.dim() == 2 else ()))
        else:
            theirs = theirs.replace(".shortcut.", ".conv_shortcut.").replace(".to_out.", ".to_out.0.")
            links.append(Link(name, _unpacked(theirs.replace("attentions.0.norm.", "attentions.0.group_norm."))))
    return links


def _vae_layers(config: VAEConfig) -> dict[str, str]:
    """Our layers -> diffusers' layers, in the order in which a frame goes through them."""
    levels, depth = len(config.vae_channels), config.layers_per_block
    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    down: list[str] = []
    for level in range(levels):
        down += [f"down_blocks.{level}.resnets.{i}" for i in range(depth)]
        down += [f"down_blocks.{level}.downsamplers.0"] if level < levels - 1 else []
    down = ["conv_in", *down, *middle, "conv_norm_out", "act", "conv_out"]
    places = {f"encoder.layers.{i}": f"encoder.{name}" for i, name in enumerate(down)}
    places[f"encoder.layers.{len(down)}"] = "quant_conv"
    places |= {"decoder.stages.0.0": "post_quant_conv", "decoder.stages.0.1": "decoder.conv_in"}
    places |= {f"decoder.stages.0.{i}": f"decoder.{name}" for i, name in enumerate(middle, start=2)}
    for level in range(levels):
        up = [f"up_blocks.{level - 1}.upsamplers.0"] if level else []
        up += [f"up_blocks.{level}.resnets.{i}" for i in range(depth + 1)]
        places |= {f"decoder.stages.{level + 1}.{i}": f"decoder.{name}" for i, name in enumerate(up)}
    return places | {"decoder.out.0": "decoder.conv_norm_out", "decoder.out.2": "decoder.conv_out"}


def _ldm_vae_names(name: str, levels: int) -> tuple[str, ...]:
    """From diffusers' layer names, with our names within a layer, to latent diffusion's."""
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)  # counted from the top
    name = name.replace(".resnets.", ".block.").replace(".upsamplers.0", ".upsample")
    name = name.replace(".shortcut.", ".nin_shortcut.").replace(".to_out.", ".proj_out.")
    return tuple(name.replace(".to_qkv.", f".{kind}.") for kind in "qkv") if ".to_qkv." in name else (name,)


def text_links(config: TextConfig, layout: Literal["transformers", "open_clip"]) -> list[Link]:
    """How our text tower's tensors are stored in `layout`; open_clip's names are relative to its text tower."""
    links = []
    for ours in text_tensors(config):
        if not ours.startswith("tower."):
            continue  # the record of the tokens seen
        name = ours.removeprefix("tower.")
        if layout == "transformers":
            name = "text_model.embeddings.position_embedding.weight" if name == "positional_embedding" else name
            packed = re.search(r"in_proj_(weight|bias)", name)
            theirs = _replaced(f"text_model.{name.removeprefix('text_model.')}", _OPEN_CLIP_TO_TRANSFORMERS)
            kinds = [theirs.replace(packed[0], f"{kind}_proj.{packed[1]}") for kind in "qkv"] if packed else [theirs]
            links.append(Link(ours, tuple(kinds)))
        else:
            links.append(Link(ours, (name,)))
    return links
