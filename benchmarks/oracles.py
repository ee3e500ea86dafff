"""Both sides of benchmarks/parity.py: diffusers' and transformers' modules of our configs, and one set of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdm.config import Config
from vdm.interop.diffusers_json import folder_json
from vdm.interop.links import Link, to_ours
from vdm.interop.tokenizer import write_tokenizer
from vdm.models import UNetConfig, VAEConfig
from vdm.text.encoder import TextConfig
from vdm.weights import Weights, fill


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every weight anew, those that start at zero or one too, so that every layer counts."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        if parameter.dim() > 1:
            noise = noise / parameter[0].numel() ** 0.5
        else:
            noise = 0.1 * noise + float("norm" in name and name.endswith("weight"))
        parameter.data.copy_(noise)
    return module.eval()


def take(ours: nn.Module, links: Sequence[Link], theirs: Mapping[str, Tensor], prefix: str = "") -> None:
    """Fill our module with their weights, by the names that `vdm convert` uses."""
    state = Weights.of({prefix + name: tensor for name, tensor in theirs.items()})
    mine = {name: tensor for name, tensor in ours.state_dict().items() if name != "seen_tokens"}
    weights, _ = to_ours("part", links, state, mine, source="theirs", left_out=lambda name: "position_ids" in name)
    fill(ours, weights, source="theirs", keep=("seen_tokens",))


def their_unet(config: UNetConfig) -> nn.Module:
    from diffusers import UNet3DConditionModel

    return UNet3DConditionModel.from_config(folder_json(fitting(model=config))["unet"])


def their_vae(config: VAEConfig) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(folder_json(fitting(vae=config))["vae"])


def their_text(config: TextConfig) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**folder_json(fitting(text=config))["text_encoder"]))


def fitting(**sections: Any) -> Config:
    """A config whose networks fit each other."""
    model, vae, text = sections.get("model"), sections.get("vae"), sections.get("text")
    if model is not None:
        text = text or TextConfig(text_width=model.context_dim, text_heads=1)
        vae = vae or VAEConfig(latent_channels=model.in_channels)
    elif text is not None:
        model = UNetConfig(context_dim=text.text_width)
    else:
        model = UNetConfig(in_channels=(vae or VAEConfig()).latent_channels)
    built = {"model": model, "vae": vae or VAEConfig(), "text": text or TextConfig()}
    return Config(name="parity", **{**built, **{k: v for k, v in sections.items() if k not in built}})


def inputs(config: UNetConfig, shape: tuple[int, int, int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, time steps and context."""
    generator = torch.Generator().manual_seed(seed)
    B, T, h, w = shape
    latents = torch.randn(B, config.in_channels, T, h, w, generator=generator)
    timesteps = torch.randint(0, 1000, (B,), generator=generator)
    return latents, timesteps, torch.randn(B, 7, config.context_dim, generator=generator)


def their_pipeline(folder: Path, config: Config, *, seed: int = 0) -> Any:
    """diffusers' pipeline with random weights, saved by diffusers itself in `folder`."""
    from diffusers import DDIMScheduler, TextToVideoSDPipeline
    from transformers import CLIPTokenizer

    trees = folder_json(config)
    text = config.text
    write_tokenizer(folder / "files", context_length=text.context_length, pad_token_id=text.pad_token_id)
    pipe = TextToVideoSDPipeline(
        vae=randomise(their_vae(config.vae), seed),
        text_encoder=randomise(their_text(text), seed + 1),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "files"),
        unet=randomise(their_unet(config.model), seed + 2),
        scheduler=DDIMScheduler.from_config(trees["scheduler"]),
    )
    pipe.save_pretrained(folder / "saved")
    pipe.set_progress_bar_config(disable=True)
    return pipe
