"""Stable Diffusion 2 as a warm start: frame by frame, the video model is the image model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import CONFIG, stirred
from torch import Tensor

from vdm.errors import UserError
from vdm.interop import open_model
from vdm.interop.convert import convert
from vdm.interop.links import to_theirs
from vdm.interop.names import text_links, unet_links, vae_links
from vdm.models import UNet3D, UNetConfig
from vdm.pipeline import TextToVideo
from vdm.text.encoder import TextConfig
from vdm.weights import Weights, open_weights, write_safetensors

# What Stable Diffusion 2 fixes: heads of 64, norms of 32 groups.
LIKE_SD = replace(
    CONFIG,
    model=UNetConfig(
        unet_dim=64, channel_mult=(1, 2), attention_levels=(True, False), num_res_blocks=1, context_dim=64
    ),
    vae=replace(CONFIG.vae, vae_channels=(32, 64), vae_norm_num_groups=32),
    text=TextConfig(text_width=64, text_heads=1, text_layers=3),
)


def single_file(folder: Path) -> tuple[Path, TextToVideo]:
    """Stable Diffusion in one file, and a video model with the same spatial layers."""
    pipe = stirred(LIKE_SD)
    unet = unet_links(LIKE_SD.model, "ldm")
    parts = {
        "model.diffusion_model.": (unet, pipe.unet),
        "first_stage_model.": (vae_links(LIKE_SD.vae, "ldm"), pipe.vae),
        "cond_stage_model.model.": (text_links(LIKE_SD.text, "open_clip"), pipe.text_encoder),
    }
    state: dict[str, Tensor] = {"betas": torch.ones(1000), "model_ema.decay": torch.ones(1)}
    for prefix, (links, module) in parts.items():
        weights, _ = to_theirs("part", links, Weights.of(module.state_dict()))
        state |= {prefix + name: tensor.clone() for name, tensor in weights.items()}
    last = "cond_stage_model.model.transformer.resblocks.2."
    before = "cond_stage_model.model.transformer.resblocks.1."
    state |= {name.replace(before, last): torch.zeros_like(t) for name, t in state.items() if name.startswith(before)}
    state |= {
        "cond_stage_model.model.text_projection": torch.zeros(64, 64),
        "cond_stage_model.model.logit_scale": torch.ones(()),
    }
    write_safetensors(folder / "v2-1_512-ema-pruned.safetensors", state)
    return folder / "v2-1_512-ema-pruned.safetensors", pipe


def image_model(pipe: TextToVideo) -> UNet3D:
    """Its spatial layers alone."""
    image = UNet3D(replace(pipe.unet.config, model_type="spatial")).eval()
    state = pipe.unet.state_dict()
    image.load_state_dict({name: state[name] for name in image.state_dict()})
    return image


def test_a_single_file_is_read(tmp_path: Path) -> None:
    file, pipe = single_file(tmp_path)
    lines: list[str] = []
    convert(file, tmp_path / "ours", to="vdm", say=lines.append)
    assert lines[0] == f"{file}: stable-diffusion layout"
    assert any("768-v" in line for line in lines)
    new = next(line for line in lines if line.startswith("  new: "))
    assert "transformer_in.norm.weight" in new
    video = TextToVideo.from_pretrained(tmp_path / "ours")
    assert video.config.model == LIKE_SD.model and video.config.text == LIKE_SD.text
    image = image_model(pipe)
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 4, 5, 6, 7, generator=generator), torch.randn(2, 4, 64, generator=generator)
    t = torch.tensor([3, 900])
    with torch.no_grad():
        whole = video.unet(latents, t, context)
        frames = [image(latents[:, :, i : i + 1], t, context) for i in range(5)]
        assert torch.equal(video.text_encoder(["ball"]), pipe.text_encoder(["ball"]))
        torch.testing.assert_close(video.vae.decode(latents), pipe.vae.decode(latents))
    torch.testing.assert_close(whole, torch.cat(frames, dim=2), rtol=1e-5, atol=1e-5)
    # The new layers are there, and learn: only their last ones are zero.
    assert video.unet.transformer_in.proj_in.weight.std() > 0 and not video.unet.transformer_in.proj_out.weight.any()


@pytest.mark.slow
def test_it_is_a_model_like_any_other(tmp_path: Path) -> None:
    """Read directly, and into the other layouts, where the new layers are the same ones."""
    file, _ = single_file(tmp_path)
    for to in ("vdm", "diffusers", "modelscope"):
        convert(file, tmp_path / to, to=to, say=lambda line: None)  # type: ignore[arg-type]
    direct = TextToVideo.from_pretrained(file)
    for to in ("vdm", "diffusers", "modelscope"):
        other = TextToVideo.from_pretrained(tmp_path / to)
        for name, tensor in direct.unet.state_dict().items():
            assert torch.equal(other.unet.state_dict()[name], tensor), (to, name)


@pytest.mark.parity
def test_a_diffusers_folder_is_read(tmp_path: Path) -> None:
    """Made by diffusers: its UNet2DConditionModel on each frame is our video model."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from vdm.interop.tokenizer import write_tokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=64,
        attention_head_dim=(1, 2),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=True,
    ).eval()  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
    ).eval()  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, hidden_act="gelu",
    )).eval()  # fmt: skip
    write_tokenizer(tmp_path / "tokenizer", context_length=77, pad_token_id=0)
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                              skip_prk_steps=True)  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"), unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(tmp_path / "sd")  # fmt: skip
    lines: list[str] = []
    convert(tmp_path / "sd", tmp_path / "ours", to="vdm", say=lines.append)
    assert any("PNDMScheduler is not there" in line for line in lines)
    video = TextToVideo.from_pretrained(tmp_path / "ours")
    assert video.config.diffusion.timestep_spacing == "leading" and video.config.sampling.height == 16
    latents, context, t = torch.randn(2, 4, 3, 8, 6), torch.randn(2, 7, 64), torch.tensor([3, 900])
    with torch.no_grad():
        have = video.unet(latents, t, context)
        for i in range(3):
            want = unet(latents[:, :, i], t, context).sample
            assert (have[:, :, i] - want).abs().max() < 1e-5 * want.abs().max()
        frames = torch.rand(2, 3, 16, 16)
        want = vae.encode(frames).latent_dist.mean
        have = video.vae.encode(frames[:, :, None]).mean[:, :, 0]
        assert (have - want).abs().max() < 1e-5 * want.abs().max()
        tokens = video.text_encoder.tokens(["a ball"])
        torch.testing.assert_close(video.text_encoder(["a ball"]), text(tokens).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_stable_diffusion_1_is_refused(tmp_path: Path) -> None:
    """Its heads are 40 to 160 wide, and its text tower has quick_gelu."""
    file, _ = single_file(tmp_path)
    state = dict(open_weights(file))
    for name, tensor in list(state.items()):
        if name.startswith("model.") and "attn2.to_" in name and name.endswith(("to_k.weight", "to_v.weight")):
            state[name] = torch.zeros(tensor.shape[0], 768)
    write_safetensors(tmp_path / "v1-5.safetensors", state)
    with pytest.raises(UserError, match="v1-5.safetensors is Stable Diffusion 1, whose heads are of several widths"):
        open_model(tmp_path / "v1-5.safetensors")
    folder = tmp_path / "sd1"
    heads = {"attention_head_dim": 8, "block_out_channels": [64, 128], "cross_attention_dim": 64, "in_channels": 4,
             "out_channels": 4, "layers_per_block": 1, "down_block_types": ["CrossAttnDownBlock2D"] * 2,
             "up_block_types": ["CrossAttnUpBlock2D"] * 2, "_class_name": "UNet2DConditionModel"}  # fmt: skip
    for name, tree in {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"}, "unet/config.json": heads,
        "vae/config.json": {}, "text_encoder/config.json": {},
        "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler"},
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"makes heads of \[8, 16\] channels, and this model has one width"):
        open_model(folder)
