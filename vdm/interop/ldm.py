"""Latent diffusion's own files: autoencoder and CLIP as the original has them too, and Stable Diffusion 2 in one file.

Sizes are read off the shapes; what these do not tell is as in Stable Diffusion 2: 32 groups in a norm, 64 channels in a
head.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from vdm.diffusion import DiffusionConfig, SamplingConfig
from vdm.errors import UserError
from vdm.interop.links import Allowed, to_ours
from vdm.interop.model import Part, StoredModel, config_of, making_sense_of, text_state
from vdm.interop.names import text_links, text_tensors, unet_links, unet_tensors, vae_links, vae_tensors
from vdm.models import UNetConfig, VAEConfig
from vdm.text.encoder import TextConfig
from vdm.text.pretrained import tower_weights
from vdm.weights import Weights, open_weights

UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."
# The schedule of all Stable Diffusion, sampled as its PNDM and DDIM are.
SCHEDULE = DiffusionConfig(timestep_spacing="leading", set_alpha_to_one=False, ddim_stride="constant")


def open_stable_diffusion(path: Path, *, allowed: Allowed) -> StoredModel:
    """Stable Diffusion 2 in one .safetensors or .ckpt file, as a warm start: temporal layers are new.

    Raises `UserError` for anything else.
    """
    whole = open_weights(path)
    unet, vae, text = (_below(whole, prefix) for prefix in (UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX))
    if not (unet and vae and text):
        raise UserError(
            f"{path} is no Stable Diffusion 2 in one file (its tensors would begin with {UNET_PREFIX}, {VAE_PREFIX} "
            f"and {TEXT_PREFIX}); give a model folder"
        )
    with making_sense_of(path):
        config = config_of(
            path.with_suffix(""),
            model=_unet_config(unet, path),
            vae=_vae_config(vae, path),
            text=text_config(tower_weights(text), str(path)),
            diffusion=SCHEDULE,
            sampling=SamplingConfig(),
        )
    return StoredModel(
        "stable-diffusion",
        path,
        config,
        {
            "unet": lambda: _open_image_unet(unet, path, config.model, allowed),
            "vae": lambda: open_vae(vae, path, config.vae, allowed),
            "text": lambda: open_text(text, path, config.text, allowed),
        },
        ("the file does not say what the model predicts: epsilon is assumed, and the 768-v model needs diffusion."
         "prediction_type=v",),
    )  # fmt: skip


def _below(weights: Weights, prefix: str) -> Weights:
    return weights.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)


def _widths(weights: Weights, block: str, tensor: str) -> list[list[int]]:
    """Output channels of the residual blocks of each level, in order; `block` numbers a level and a block in it."""
    levels: dict[int, dict[int, int]] = {}
    for name, spec in weights.specs.items():
        if match := re.fullmatch(rf"{block}\.{tensor}", name):
            levels.setdefault(int(match[1]), {})[int(match[2])] = spec.shape[0]
    return [[blocks[i] for i in sorted(blocks)] for _, blocks in sorted(levels.items())]


def _unet_config(unet: Weights, path: Path) -> UNetConfig:
    widths: list[list[int]] = [[]]
    attention = [False]
    for n in range(1, 1000):
        if f"input_blocks.{n}.0.op.weight" in unet:
            widths.append([])
            attention.append(False)
        elif f"input_blocks.{n}.0.out_layers.3.weight" in unet:
            widths[-1].append(unet.specs[f"input_blocks.{n}.0.out_layers.3.weight"].shape[0])
            attention[-1] = f"input_blocks.{n}.1.proj_in.weight" in unet
        else:
            break
    first = "input_blocks.0.0.weight"
    context = next((s.shape[1] for name, s in unet.specs.items() if name.endswith("attn2.to_k.weight")), 0)
    same = {len(level) for level in widths}
    if first not in unet or len(same) != 1 or not widths[0] or not context:
        raise UserError(f"{path} holds no UNet of Stable Diffusion 2; give another file")
    dim = unet.specs[first].shape[0]
    if context == 768:
        raise UserError(f"{path} is Stable Diffusion 1, whose heads are of several widths; give Stable Diffusion 2")
    return UNetConfig(
        in_channels=unet.specs[first].shape[1],
        unet_dim=dim,
        channel_mult=tuple(level[0] // dim for level in widths),
        attention_levels=tuple(attention),
        num_res_blocks=same.pop(),
        context_dim=context,
    )


def _vae_config(vae: Weights, path: Path) -> VAEConfig:
    widths = _widths(vae, r"encoder\.down\.(\d+)\.block\.(\d+)", r"conv2\.weight")
    if not widths or not widths[0] or "post_quant_conv.weight" not in vae:
        raise UserError(f"{path} holds no autoencoder of Stable Diffusion; give another file")
    return VAEConfig(
        latent_channels=vae.specs["post_quant_conv.weight"].shape[1],
        vae_channels=tuple(level[0] for level in widths),
        layers_per_block=len(widths[0]),
    )


def _open_image_unet(unet: Weights, path: Path, config: UNetConfig, allowed: Allowed) -> Part:
    links = unet_links(config, "ldm")
    weights, report = to_ours("unet", links, unet, unet_tensors(config), source=str(path), allowed=allowed)
    return Part(weights, (path,), report)


def text_config(tower: Weights, source: str) -> TextConfig:
    """The shape of a text tower; heads are 64 wide, as in every CLIP."""
    layers = {int(match[1]) for name in tower if (match := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    if "positional_embedding" not in tower or not layers:
        raise UserError(f"{source} holds no text tower of open_clip; give another file")
    length, width = tower.specs["positional_embedding"].shape
    return TextConfig(
        text_width=width, text_heads=max(1, width // 64), text_layers=max(layers) + 1, context_length=length
    )


def open_vae(whole: Weights, file: Path, config: VAEConfig, allowed: Allowed) -> Part:
    """The file may be a whole image model, as the original's is, of which the rest is left out."""
    if any(name.startswith(VAE_PREFIX) for name in whole):
        whole = whole.renamed(lambda name: name.removeprefix(VAE_PREFIX) if name.startswith(VAE_PREFIX) else name)
    weights, report = to_ours(
        "vae", vae_links(config, "ldm"), whole, vae_tensors(config), source=str(file), allowed=allowed,
        left_out=lambda name: not name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")),
    )  # fmt: skip
    return Part(weights, (file,), report)


def open_text(clip: Weights, file: Path, config: TextConfig, allowed: Allowed) -> Part:
    """The file is a whole CLIP, of which we use the text tower but for its last layer and its projection."""
    weights, report = to_ours(
        "text", text_links(config, "open_clip"), _clip_names(clip), tower_tensors(config),
        source=str(file), allowed=allowed, left_out=lambda name: _unused_in_clip(name, config),
    )  # fmt: skip
    return Part(text_state(weights, file.parent), (file,), report)


def _clip_names(weights: Weights) -> Weights:
    """The tower's tensors named relative to it, all others as they are."""
    tower = tower_weights(weights)
    others = weights.renamed(lambda name: name if name.removeprefix("module.").startswith("visual.") else None)
    return tower.updated(others)


def _unused_in_clip(name: str, config: TextConfig) -> bool:
    last = f"transformer.resblocks.{config.text_layers - 1}."
    unused = ("text_projection", "logit_scale", "logit_bias", "attn_mask")
    return name.startswith((last, "visual.", "module.visual.")) or name in unused


def tower_tensors(config: TextConfig) -> dict[str, Tensor]:
    """Our text tensors without the record of the tokens seen, on the meta device."""
    return {name: tensor for name, tensor in text_tensors(config).items() if name.startswith("tower.")}
