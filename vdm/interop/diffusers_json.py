"""What the JSON files of a diffusers folder say of a model, as our config; and our config, as they say it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdm.config import Config
from vdm.diffusion import DiffusionConfig, NoiseSchedule
from vdm.errors import UserError
from vdm.interop.model import need, refuse_unless
from vdm.models import UNetConfig, VAEConfig
from vdm.text.encoder import VOCABULARY, TextConfig

INDEX = "model_index.json"
VIDEO_PIPELINE = "TextToVideoSDPipeline"
SAMPLERS = ("DDIMScheduler", "DDPMScheduler")
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


# What the folder says -> our config


def read_unet(tree: Mapping[str, Any], path: Path, *, video: bool) -> UNetConfig:
    kind = "UNet3DConditionModel" if video else "UNet2DConditionModel"
    fixed = {
        "_class_name": kind, "act_fn": "silu", "downsample_padding": 1, "mid_block_scale_factor": 1, "norm_eps": 1e-5,
        "time_cond_proj_dim": None, "num_attention_heads": None, "class_embed_type": None, "addition_embed_type": None,
        "center_input_sample": False, "resnet_time_scale_shift": "default", "transformer_layers_per_block": 1,
        "dual_cross_attention": False, "only_cross_attention": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
        "encoder_hid_dim": None, "time_embedding_type": "positional", "flip_sin_to_cos": True, "freq_shift": 0,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    }  # fmt: skip
    refuse_unless(tree, fixed, path)
    widths = need(tree, "block_out_channels", path)
    if any(width % widths[0] for width in widths):
        raise UserError(f"{path}: block_out_channels {widths} are no multiples of the first, as this model's are")
    attention = [name.startswith("CrossAttn") for name in need(tree, "down_block_types", path)]
    other = "3D" if video else "2D"
    refuse_unless(
        tree,
        {
            "down_block_types": [("CrossAttnDownBlock" if one else "DownBlock") + other for one in attention],
            "up_block_types": [("CrossAttnUpBlock" if one else "UpBlock") + other for one in attention[::-1]],
            "out_channels": need(tree, "in_channels", path),
        },
        path,
    )
    return UNetConfig(
        in_channels=tree["in_channels"],
        unet_dim=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        attention_levels=tuple(attention),
        num_res_blocks=tree.get("layers_per_block", 2),
        attention_head_dim=_head_dim(tree, path, widths, attention, video=video),
        context_dim=need(tree, "cross_attention_dim", path),
        norm_num_groups=tree.get("norm_num_groups", 32),
    )


def _head_dim(tree: Mapping[str, Any], path: Path, widths: list[int], attention: list[bool], *, video: bool) -> int:
    """Channels of a head. The video model says so; of an image model "attention_head_dim" is the number of heads."""
    said = need(tree, "attention_head_dim", path)
    if video and isinstance(said, int):
        return said
    heads = [said] * len(widths) if isinstance(said, int) else said
    if video:
        dims = set(heads)
    else:
        dims = {width // count for width, count, there in zip(widths, heads, attention, strict=True) if there}
        dims.add(widths[-1] // heads[-1])
    if len(dims) != 1:
        raise UserError(
            f"{path}: attention_head_dim {said} makes heads of {sorted(dims)} channels, and this model has one width; "
            "Stable Diffusion 2 has (64), Stable Diffusion 1 has not"
        )
    return int(dims.pop())


def read_vae(tree: Mapping[str, Any], path: Path) -> VAEConfig:
    widths = need(tree, "block_out_channels", path)
    fixed = {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True,
        "mid_block_add_attention": True, "shift_factor": None, "latents_mean": None, "latents_std": None,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths), "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "out_channels": need(tree, "in_channels", path),
    }  # fmt: skip
    refuse_unless(tree, fixed, path)
    return VAEConfig(
        image_channels=tree["in_channels"],
        latent_channels=need(tree, "latent_channels", path),
        vae_channels=tuple(widths),
        layers_per_block=tree.get("layers_per_block", 1),
        vae_norm_num_groups=tree.get("norm_num_groups", 32),
        scaling_factor=tree.get("scaling_factor", 0.18215),
    )


def read_text(tree: Mapping[str, Any], path: Path, pad_token_id: int) -> TextConfig:
    inner = tree.get("text_config", tree)
    width = need(inner, "hidden_size", path)
    fixed = {"hidden_act": "gelu", "vocab_size": VOCABULARY, "layer_norm_eps": 1e-5, "intermediate_size": 4 * width}
    refuse_unless(inner, fixed, path)
    if "hidden_act" not in inner:
        raise UserError(f"{path} does not say hidden_act, so it is quick_gelu, and this model's is gelu; give another")
    return TextConfig(
        text_width=width,
        text_heads=need(inner, "num_attention_heads", path),
        text_layers=need(inner, "num_hidden_layers", path) + 1,  # ours counts the last one, which is never built
        context_length=inner.get("max_position_embeddings", 77),
        pad_token_id=pad_token_id,
    )


def read_schedule(tree: Mapping[str, Any], path: Path) -> DiffusionConfig:
    named = tree.get("beta_schedule", "linear")
    if named not in _BETAS:
        raise UserError(f"{path}: beta_schedule is {named!r}; this model has {', '.join(_BETAS)}")
    predicted = tree.get("prediction_type", "epsilon")
    if predicted not in _PREDICTIONS:
        raise UserError(f"{path}: prediction_type is {predicted!r}; this model has {', '.join(_PREDICTIONS)}")
    betas = tree.get("trained_betas")
    samples = tree["_class_name"] in SAMPLERS
    return DiffusionConfig(
        num_train_timesteps=tree.get("num_train_timesteps", 1000),
        beta_schedule=_BETAS[named],  # type: ignore[arg-type]
        beta_start=tree.get("beta_start", 0.0001),
        beta_end=tree.get("beta_end", 0.02),
        trained_betas=None if betas is None else tuple(betas),
        prediction_type=_PREDICTIONS[predicted],  # type: ignore[arg-type]
        zero_terminal_snr=tree.get("rescale_betas_zero_snr", False),
        timestep_spacing=tree.get("timestep_spacing", "leading"),
        steps_offset=tree.get("steps_offset", 0),
        set_alpha_to_one=tree.get("set_alpha_to_one", True),
        ddim_stride="constant",
        clip_sample=samples and tree.get("clip_sample", True),
        clip_sample_range=tree.get("clip_sample_range", 1.0),
        thresholding=samples and tree.get("thresholding", False),
        dynamic_thresholding_ratio=tree.get("dynamic_thresholding_ratio", 0.995),
        sample_max_value=tree.get("sample_max_value", 1.0),
    )


# Our config -> what the folder says


def folder_json(config: Config) -> dict[str, Any]:
    """All JSON files of the folder, under the names of their folders. Raises `UserError`."""
    _refuse_what_diffusers_lacks(config)
    unet, vae, text = config.model, config.vae, config.text
    levels = unet.attention_levels
    return {
        INDEX: {
            "_class_name": VIDEO_PIPELINE,
            "_diffusers_version": "0.30.0",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet3DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "unet": {
            "_class_name": "UNet3DConditionModel",
            "in_channels": unet.in_channels,
            "out_channels": unet.in_channels,
            "down_block_types": ["CrossAttnDownBlock3D" if one else "DownBlock3D" for one in levels],
            "up_block_types": ["CrossAttnUpBlock3D" if one else "UpBlock3D" for one in levels[::-1]],
            "block_out_channels": list(unet.channels),
            "layers_per_block": unet.num_res_blocks,
            "norm_num_groups": unet.norm_num_groups,
            "cross_attention_dim": unet.context_dim,
            "attention_head_dim": unet.attention_head_dim,
            "sample_size": config.sampling.height // vae.factor,  # one number: what diffusers samples is square
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "in_channels": vae.image_channels,
            "out_channels": vae.image_channels,
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.vae_channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.vae_channels),
            "block_out_channels": list(vae.vae_channels),
            "layers_per_block": vae.layers_per_block,
            "latent_channels": vae.latent_channels,
            "norm_num_groups": vae.vae_norm_num_groups,
            "scaling_factor": vae.scaling_factor,
            "sample_size": config.sampling.height,
        },
        "text_encoder": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "hidden_act": "gelu",
            "hidden_size": text.text_width,
            "intermediate_size": 4 * text.text_width,
            "num_attention_heads": text.text_heads,
            "num_hidden_layers": text.text_layers - 1,  # the last one is not used, and not there
            "max_position_embeddings": text.context_length,
            "vocab_size": VOCABULARY,
            "projection_dim": text.text_width,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": text.pad_token_id,
            "layer_norm_eps": 1e-5,
            "torch_dtype": "float32",  # else it is loaded as it is stored, and the UNet in float32
        },
        "scheduler": _scheduler(config.diffusion),
    }


def _scheduler(config: DiffusionConfig) -> dict[str, Any]:
    """DDIMScheduler's settings; a noise schedule that it has no name for goes as its betas."""
    named = {ours: theirs for theirs, ours in _BETAS.items()}
    betas = config.trained_betas
    if config.noise_shift != 1.0:
        betas = tuple(NoiseSchedule(config).trained_betas())
    # The original's timesteps are the leading ones with an offset of 1, where the steps divide 1000.
    original = config.timestep_spacing == "modelscope"
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.num_train_timesteps,
        "beta_schedule": named[config.beta_schedule],
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "trained_betas": None if betas is None else list(betas),
        "rescale_betas_zero_snr": config.zero_terminal_snr and config.noise_shift == 1.0,
        "prediction_type": {ours: theirs for theirs, ours in _PREDICTIONS.items()}[config.prediction_type],
        "timestep_spacing": "leading" if original else config.timestep_spacing,
        "steps_offset": 1 if original else config.steps_offset,
        "set_alpha_to_one": config.set_alpha_to_one,
        "clip_sample": config.clip_sample,
        "clip_sample_range": config.clip_sample_range,
        "thresholding": config.thresholding,
        "dynamic_thresholding_ratio": config.dynamic_thresholding_ratio,
        "sample_max_value": config.sample_max_value,
    }


def _refuse_what_diffusers_lacks(config: Config) -> None:
    """Raises `UserError` naming the first key that diffusers' classes hard-code otherwise."""
    unet = config.model
    fixed = {
        "model.model_type": (unet.model_type, "modelscope"),
        "model.attention_heads": (unet.attention_heads, 8),
        "model.temporal_layers": (unet.temporal_layers, 4),
        "model.channel_mult[0]": (unet.channel_mult[0], 1),
        "vae.temporal_decoder": (config.vae.temporal_decoder, False),
    }
    for key, (ours, theirs) in fixed.items():
        if ours != theirs:
            raise UserError(f"{key} is {ours}, and diffusers' model can only have {theirs}; convert --to vdm instead")
