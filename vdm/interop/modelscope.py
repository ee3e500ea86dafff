"""The original's folder: configuration.json, and a pickle of tensors for the UNet, the autoencoder and the whole CLIP.

The original code builds its autoencoder and text tower at one size and its norms with 32 groups, and says so nowhere in
the folder; a folder written here has our whole config beside it, and is open to the original code at its sizes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from vdm.config import Config
from vdm.diffusion import DiffusionConfig, SamplingConfig
from vdm.errors import UserError
from vdm.interop.ldm import VAE_PREFIX, open_text, open_vae, text_config, tower_tensors
from vdm.interop.links import NOTHING, Allowed, Report, to_ours, to_theirs
from vdm.interop.model import (
    Part,
    StoredModel,
    config_of,
    making_sense_of,
    need,
    read_json,
    read_note,
    refuse_unless,
    with_note,
    write_json,
    write_notes,
)
from vdm.interop.names import text_links, unet_links, unet_tensors, vae_links
from vdm.models import UNetConfig, VAEConfig
from vdm.text.encoder import TextConfig
from vdm.text.pretrained import tower_weights
from vdm.weights import SUFFIX, open_weights, write_pickle

CONFIGURATION = "configuration.json"
FILES = {
    "unet": "text2video_pytorch_model.pth",
    "vae": "VQGAN_autoencoder.pth",
    "text": "open_clip_pytorch_model.bin",
}
FILE_KEYS = {"unet": "ckpt_unet", "vae": "ckpt_autoencoder", "text": "ckpt_clip"}

# The original's own way to sample: `linear_sd` betas, 50 steps at t = 1, 21, ..., 981, each 20 steps down, and the last
# to step 0. diffusers' DDIMScheduler with leading spacing, steps_offset 1 and set_alpha_to_one false does the same
# wherever the number of steps divides 1000. Elsewhere the original goes on to the end of the schedule, with more steps
# than asked for (31 for 30), and diffusers leaves the noisiest part out. Besides, the original calls the network once
# for each of the two prompts, rounds pixels down to uint8, and has no seed.
SCHEDULE = DiffusionConfig(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    timestep_spacing="modelscope",
    set_alpha_to_one=False,
    ddim_stride="constant",
)
SAMPLING = SamplingConfig(
    num_frames=16, height=256, width=256, sampling_fps=8.0, num_inference_steps=50, guidance_scale=9.0
)


def open_modelscope(path: Path, *, allowed: Allowed = NOTHING) -> StoredModel:
    """The original's folder. Raises `UserError` where it holds another model."""
    file = path / CONFIGURATION
    model = need(read_json(file), "model", file)
    note = read_note(path)
    with making_sense_of(file):
        if "model_cfg" not in model or "unet_dim" not in model["model_cfg"]:
            kind = model.get("type")
            raise UserError(f"{file} describes {kind}, not the original's text-to-video model; give another folder")
        cfg, names = model["model_cfg"], need(model, "model_args", file)
        files = {part: _weight_file(path, names.get(key, FILES[part])) for part, key in FILE_KEYS.items()}
        unet = _read_unet(cfg, file, groups=note.model.norm_num_groups if note else 32)
        sampling = replace(SAMPLING, num_frames=names.get("max_frames", 16))
    with making_sense_of(files["text"]):
        text = text_config(tower_weights(open_weights(files["text"])), str(files["text"]))
    with making_sense_of(path):
        vae = note.vae if note else VAEConfig()
        derived = config_of(path, model=unet, vae=vae, text=text, diffusion=SCHEDULE, sampling=sampling)
    config, remarks = with_note(path, derived, _model_cfg)
    return StoredModel(
        "modelscope",
        path,
        config,
        {
            "unet": lambda: _open_unet(files["unet"], config.model, allowed),
            "vae": lambda: open_vae(open_weights(files["vae"]), files["vae"], config.vae, allowed),
            "text": lambda: open_text(open_weights(files["text"]), files["text"], config.text, allowed),
        },
        remarks,
    )


def _weight_file(path: Path, name: str) -> Path:
    """The named file, or a .safetensors of the same stem."""
    file = path / Path(name).name
    safe = file.with_suffix(SUFFIX)
    return safe if safe.is_file() and not file.is_file() else file


def _read_unet(cfg: Mapping[str, Any], file: Path, *, groups: int) -> UNetConfig:
    fixed = {
        "mean_type": "eps", "temporal_attention": "True", "num_timesteps": 1000, "var_type": "fixed_small",
        "unet_out_dim": need(cfg, "unet_in_dim", file),
    }  # fmt: skip
    refuse_unless({**cfg, "temporal_attention": str(cfg.get("temporal_attention", True))}, fixed, file)
    mult = tuple(need(cfg, "unet_dim_mult", file))
    scales = need(cfg, "unet_attn_scales", file)
    return UNetConfig(
        in_channels=cfg["unet_in_dim"],
        unet_dim=cfg["unet_dim"],
        channel_mult=mult,
        attention_levels=tuple(any(abs(scale - 0.5**level) < 1e-6 for scale in scales) for level in range(len(mult))),
        num_res_blocks=need(cfg, "unet_res_blocks", file),
        attention_heads=need(cfg, "unet_num_heads", file),
        attention_head_dim=need(cfg, "unet_head_dim", file),
        context_dim=need(cfg, "unet_context_dim", file),
        dropout=cfg.get("unet_dropout", 0.0),
        norm_num_groups=groups,
    )


def _open_unet(file: Path, config: UNetConfig, allowed: Allowed) -> Part:
    links = unet_links(config, "modelscope")
    weights, report = to_ours(
        "unet", links, open_weights(file), unet_tensors(config), source=str(file), allowed=allowed
    )
    return Part(weights, (file,), report)


# Writing


def write_modelscope(model: StoredModel, folder: Path, *, dtype: torch.dtype | None = None) -> list[Report]:
    """Write the original's files into `folder`, which is there and empty.

    What the original CLIP has besides is filled with zeros, which take no room: its code loads all, and uses what we
    have. Raises `UserError` for a model that the layout cannot hold.
    """
    config = model.config
    cfg = _model_cfg(config)
    names = {FILE_KEYS[part]: name for part, name in FILES.items()}
    args = {**names, "max_frames": config.sampling.num_frames, "tiny_gpu": 1}
    kind = "latent-text-to-video-synthesis"
    write_json(
        folder / CONFIGURATION,
        {
            "framework": "pytorch",
            "task": "text-to-video-synthesis",
            "model": {"type": kind, "model_args": args, "model_cfg": cfg},
            "pipeline": {"type": kind},
        },
    )
    write_notes(folder, config, model.open("text").weights.cast(dtype))

    def convert(part: str, links: list[Any]) -> tuple[dict[str, Tensor], Report]:
        weights, report = to_theirs(part, links, model.open(part).weights.cast(dtype))
        return {name: weights[name].clone() for name in weights}, report

    unet, unet_report = convert("unet", unet_links(config.model, "modelscope"))
    write_pickle(folder / FILES["unet"], unet)
    del unet  # one part in memory at a time
    vae, vae_report = convert("vae", vae_links(config.vae, "ldm"))
    write_pickle(folder / FILES["vae"], {"state_dict": {VAE_PREFIX + name: t for name, t in vae.items()}})
    text, text_report = convert("text", text_links(config.text, "open_clip"))
    write_pickle(folder / FILES["text"], {**text, **dict(_rest_of_clip(config.text))})
    return [unet_report, vae_report, text_report]


def _model_cfg(config: Config) -> dict[str, Any]:
    """`model_cfg` of configuration.json. Raises `UserError` naming the first key that the layout cannot say."""
    unet = config.model
    fixed = {
        "model.model_type": (unet.model_type, "modelscope"),
        "model.temporal_layers": (unet.temporal_layers, 4),
        "vae.temporal_decoder": (config.vae.temporal_decoder, False),
    }
    for key, (ours, theirs) in fixed.items():
        if ours != theirs:
            raise UserError(f"{key} is {ours}, and the original can only have {theirs}; convert --to diffusers or vdm")
    return {
        "unet_in_dim": unet.in_channels,
        "unet_dim": unet.unet_dim,
        "unet_y_dim": 768,
        "unet_context_dim": unet.context_dim,
        "unet_out_dim": unet.in_channels,
        "unet_dim_mult": list(unet.channel_mult),
        "unet_num_heads": unet.attention_heads,
        "unet_head_dim": unet.attention_head_dim,
        "unet_res_blocks": unet.num_res_blocks,
        "unet_attn_scales": [0.5**level for level, there in enumerate(unet.attention_levels) if there],
        "unet_dropout": unet.dropout,
        "temporal_attention": "True",
        "num_timesteps": 1000,
        "mean_type": "eps",
        "var_type": "fixed_small",
        "loss_type": "mse",
    }


def remarks_on_modelscope(config: Config) -> tuple[str, ...]:
    """What the original code, which says it nowhere in the folder, has otherwise than this config; vdm has a note."""
    unet, vae, original = config.model, {**asdict(config.vae), "vae_weights": None}, UNetConfig()
    sizes = {
        "context_dim": unet.context_dim == original.context_dim,
        "norm_num_groups": unet.norm_num_groups == original.norm_num_groups,
        "the autoencoder": vae == asdict(VAEConfig()),
        "the text tower": _is_vit_h(config.text),
        "pad_token_id": config.text.pad_token_id == 0,
    }
    remarks = []
    if not all(sizes.values()):
        differ = ", ".join(name for name, same in sizes.items() if not same)
        remarks.append(f"the original code has another {differ} built in, and cannot open this folder; vdm can")
    keys = (
        "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "noise_shift", "trained_betas",
        "zero_terminal_snr", "prediction_type",
    )  # fmt: skip
    if differ := ", ".join(key for key in keys if getattr(config.diffusion, key) != getattr(SCHEDULE, key)):
        remarks.append(
            f"the original code has another {differ} built in, and would sample this model wrongly; vdm does not"
        )
    return tuple(remarks)


def _is_vit_h(config: TextConfig) -> bool:
    big = TextConfig()
    keys = ("text_width", "text_heads", "text_layers", "context_length")
    return all(getattr(config, key) == getattr(big, key) for key in keys)


def _rest_of_clip(config: TextConfig) -> Iterator[tuple[str, Tensor]]:
    """What a CLIP has besides the part of its text tower that we have: zeros, all in the memory of one number.

    That is the tower's last layer, which makes its depth what it says; and of ViT-H/14, all else.
    """
    have = {link.theirs[0]: tensor for link, tensor in zip(
        text_links(config, "open_clip"), tower_tensors(config).values(), strict=True
    )}  # fmt: skip
    last, before = (f"transformer.resblocks.{config.text_layers - i}." for i in (1, 2))
    rest = {name.replace(before, last): tensor for name, tensor in have.items() if name.startswith(before)}
    if _is_vit_h(config):
        with torch.device("meta"):
            whole = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")).state_dict()
        rest = {name: tensor for name, tensor in whole.items() if name not in have and name != "attn_mask"}
    for name, tensor in rest.items():
        yield name, torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
