"""The original's folder: its own loop, its own CLIP and image files, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CONFIG, stirred
from torch import Tensor

from vdm.config import load
from vdm.diffusion import NoiseSchedule, ddim_sample, guided
from vdm.errors import UserError
from vdm.interop import open_model
from vdm.interop.convert import convert
from vdm.interop.modelscope import SAMPLING, SCHEDULE, _rest_of_clip
from vdm.interop.names import text_links
from vdm.models import UNetConfig, VAEConfig
from vdm.text.encoder import TextConfig
from vdm.weights import open_weights, sha256, write_pickle, write_safetensors

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {  # what the public folder's configuration.json says of the UNet
    "unet_in_dim": 4, "unet_dim": 320, "unet_y_dim": 768, "unet_context_dim": 1024, "unet_out_dim": 4,
    "unet_dim_mult": [1, 2, 4, 4], "unet_num_heads": 8, "unet_head_dim": 64, "unet_res_blocks": 2,
    "unet_attn_scales": [1, 0.5, 0.25], "unet_dropout": 0.1, "temporal_attention": "True", "num_timesteps": 1000,
    "mean_type": "eps", "var_type": "fixed_small", "loss_type": "mse",
}  # fmt: skip


def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A denoiser for k contexts at a time, as the UNet is."""
    x = torch.cat([x] * (len(y) // len(x)))
    return (1.3 * x + 0.2).sin() + y.reshape(-1, *[1] * (x.ndim - 1)) * (t[0] / 1000)


def the_original_loop(x: Tensor, *, steps: int, scale: float, cond: Tensor, uncond: Tensor) -> Tensor:
    """Sampling as the report's code does it, written down from its equations, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    stride = 1000 // steps
    for t in reversed([min(1 + k, 999) for k in range(0, 1000, stride)]):
        now, then = alpha_bar[t], alpha_bar[max(t - stride, 0)]
        step = torch.full((len(x),), t)
        unguided = network(x, step, uncond)
        eps = unguided + scale * (network(x, step, cond) - unguided)
        x0 = (1 / now).sqrt() * x - (1 / now - 1).sqrt() * eps
        x = then.sqrt() * x0 + (1 - then).sqrt() * eps
    return x


@settings(max_examples=15)
@given(st.sampled_from([50, 20, 30, 7, 1, 333, 600]))
def test_the_preset_is_the_originals_loop(steps: int) -> None:
    x = torch.randn(2, 4, 2, 3, 3, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
    cond, uncond = torch.tensor([0.5, 0.7]), torch.tensor([0.1, 0.1])
    expected = the_original_loop(x, steps=steps, scale=9.0, cond=cond, uncond=uncond)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        both = network(x, t, torch.cat([uncond, cond]))
        return both[:2] + 9.0 * (both[2:] - both[:2])

    found = ddim_sample(denoise, x, NoiseSchedule(SCHEDULE), num_steps=steps)
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


def test_the_preset_visits_what_it_is_said_to() -> None:
    assert NoiseSchedule(SCHEDULE).timesteps(50).tolist() == list(range(981, 0, -20))
    assert NoiseSchedule(SCHEDULE).timesteps(30).tolist()[0] == 991, "diffusers would begin at 958"
    assert (SAMPLING.num_inference_steps, SAMPLING.guidance_scale, SAMPLING.eta) == (50, 9.0, 0.0)
    config = load(ROOT / "configs" / "modelscope-1.7b.yaml")
    assert config.diffusion == SCHEDULE and config.sampling == SAMPLING
    # Guidance calls the network once for both prompts; that is the same but for rounding.
    x, t = torch.ones(1, 4, 1, 1, 1), torch.tensor([500])
    one = guided(network, torch.tensor([0.5]), torch.tensor([0.1]), scale=9.0)(x, t)
    two = network(x, t, torch.tensor([0.1])) * -8.0 + network(x, t, torch.tensor([0.5])) * 9.0
    torch.testing.assert_close(one, two)


def test_a_folder_that_only_says_what_the_public_one_does_is_the_public_model(tmp_path: Path) -> None:
    args = {"ckpt_clip": "clip.bin", "ckpt_unet": "unet.pth", "ckpt_autoencoder": "vae.pth", "max_frames": 24}
    tree = {"framework": "pytorch", "model": {"type": "x", "model_args": args, "model_cfg": PUBLIC}}
    (tmp_path / "configuration.json").write_text(json.dumps(tree))
    zero = torch.zeros(1)
    names = {link.theirs[0]: tuple(t) for link, t in zip(text_links(TextConfig(), "open_clip"), shapes(), strict=True)}
    whole = {name: zero.expand(shape) for name, shape in names.items()} | dict(_rest_of_clip(TextConfig()))
    torch.save(whole, tmp_path / "clip.bin")
    config = open_model(tmp_path).config
    assert config.model == UNetConfig(dropout=0.1) and config.vae == VAEConfig() and config.text == TextConfig()
    assert config.diffusion == SCHEDULE and config.sampling == replace(SAMPLING, num_frames=24)


def shapes() -> list[torch.Size]:
    from vdm.interop.ldm import tower_tensors

    return [tensor.shape for tensor in tower_tensors(TextConfig()).values()]


def test_the_clip_of_the_full_size_is_a_whole_one() -> None:
    """open_clip, and so the original code, loads ViT-H/14 from what we write; zeros take no room in it."""
    with torch.device("meta"):
        whole = open_clip.create_model("ViT-H-14", pretrained=None, load_weights=False, device="meta").state_dict()
    ours = {link.theirs[0] for link in text_links(TextConfig(), "open_clip")}
    rest = dict(_rest_of_clip(TextConfig()))
    assert not ours & set(rest)
    assert ours | set(rest) == set(whole) - {"attn_mask"}
    assert all(rest[name].shape == whole[name].shape for name in rest)
    assert sum(tensor.untyped_storage().nbytes() for tensor in rest.values()) < 10_000


def test_a_whole_image_model_in_the_autoencoders_place(exported: dict[str, Path], tmp_path: Path, model: Path) -> None:
    """The public VQGAN_autoencoder.pth is all of Stable Diffusion, of which the original takes its part."""
    folder = shutil.copytree(exported["modelscope"], tmp_path / "folder")
    file = folder / "VQGAN_autoencoder.pth"
    state = {**open_weights(file), "model.diffusion_model.out.0.bias": torch.ones(3), "betas": torch.ones(1000)}
    write_pickle(file, {"state_dict": state, "global_step": 875_000})
    lines: list[str] = []
    convert(folder, tmp_path / "back", to="vdm", say=lines.append)
    assert "  left out: model.diffusion_model.out.0.bias, betas" in lines
    assert sha256(tmp_path / "back" / "vae.safetensors") == sha256(model / "vae.safetensors")


def test_safetensors_in_the_place_of_pickles(exported: dict[str, Path], tmp_path: Path, model: Path) -> None:
    folder = shutil.copytree(exported["modelscope"], tmp_path / "folder")
    for file in [*folder.glob("*.pth"), *folder.glob("*.bin")]:
        write_safetensors(file.with_suffix(".safetensors"), dict(open_weights(file)))
        file.unlink()
    convert(folder, tmp_path / "back", to="vdm", say=lambda line: None)
    for part in ("unet", "vae", "text"):
        assert sha256(tmp_path / "back" / f"{part}.safetensors") == sha256(model / f"{part}.safetensors")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mean_type": "x0"}, "mean_type is 'x0', and this model can only have 'eps'"),
        ({"temporal_attention": "False"}, "temporal_attention is 'False'"),
        ({"unet_out_dim": 8}, "unet_out_dim is 8"),
        ({"unet_dim_mult": [1, 2]}, r"middle_block.0.in_layers.0.weight is \(48,\), where this model has"),
        ({"unet_head_dim": 24}, "does not divide|do not divide"),
    ],
)
def test_another_model_is_named(
    exported: dict[str, Path], changes: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported["modelscope"], tmp_path / "folder")
    tree = json.loads((folder / "configuration.json").read_text())
    tree["model"]["model_cfg"] |= changes
    (folder / "configuration.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=sentence):
        convert(folder, tmp_path / "t", to="vdm", say=lambda line: None)


def test_a_file_without_a_text_tower_is_named(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported["modelscope"], tmp_path / "folder")
    torch.save({"visual.proj": torch.ones(1)}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="open_clip_pytorch_model.bin holds no text tower of open_clip"):
        open_model(folder)


def test_the_original_can_say_what_diffusers_cannot(tmp_path: Path) -> None:
    """Another number of heads at the input, and a first level wider than the input."""
    config = replace(CONFIG, model=replace(CONFIG.model, attention_heads=2, channel_mult=(2, 2, 3)))
    stirred(config).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "over", to="modelscope", say=lambda line: None)
    convert(tmp_path / "over", tmp_path / "back", to="vdm", say=lambda line: None)
    assert sha256(tmp_path / "ours" / "unet.safetensors") == sha256(tmp_path / "back" / "unet.safetensors")
