"""Prompt -> video: the one place where text, UNet, VAE and schedule meet, for sampling and for training alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vdm.checkpoint import CONFIG, load_weights, read_manifest, save_checkpoint, verify
from vdm.config import Config, load, to_yaml
from vdm.diffusion import NoiseSchedule, SamplingConfig, ddim_sample, ddpm_sample, guided, initial_noise
from vdm.errors import UserError
from vdm.models import UNet3D, VideoVAE
from vdm.text.encoder import TextEncoder, pack_vocabulary, unpack_vocabulary
from vdm.text.pretrained import load_open_clip

SHIPPED = Path(__file__).parent / "assets" / "demo"


@dataclass(frozen=True)
class Components:
    """The parts of a model, on one device."""

    unet: UNet3D
    vae: VideoVAE
    text_encoder: TextEncoder
    schedule: NoiseSchedule

    def modules(self) -> dict[str, nn.Module]:
        """Parts with weights, under their names in a checkpoint."""
        return {"unet": self.unet, "vae": self.vae, "text": self.text_encoder}


def without_sources(config: Config) -> Config:
    """The config for a model whose weights all come from one checkpoint: what they were first made from is history."""
    return replace(config, vae=replace(config.vae, vae_weights=None), text=replace(config.text, text_weights=None))


def build_components(config: Config) -> Components:
    """Build all parts of `config`, on the CPU: random weights from `config.seed`, then those that `config` names.

    Raises `UserError` where named weights are missing or of another shape.
    """
    vae = build_vae(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet, text_encoder = UNet3D(config.model), TextEncoder(config.text)
    _start_text(text_encoder)
    return Components(unet, vae, text_encoder, NoiseSchedule(config.diffusion))


def build_text_encoder(config: Config) -> TextEncoder:
    """The text encoder alone: random weights from `config.seed`, then those that `config` names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        text_encoder = TextEncoder(config.text)
    _start_text(text_encoder)
    return text_encoder


def _start_text(text_encoder: TextEncoder) -> None:
    """Fill a text encoder with the weights that its own config names: a checkpoint folder's, or open_clip's."""
    weights = text_encoder.config.text_weights
    folder = SHIPPED if weights == "shipped" else Path(weights or "")
    if weights is not None and (folder / CONFIG).is_file():
        _load_trained(text_encoder, folder, "text", free=("text_weights", "text_trainable"))
    elif weights is not None:
        load_open_clip(text_encoder, weights)


def build_vae(config: Config) -> VideoVAE:
    """The autoencoder alone, made as `build_components` makes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vae = VideoVAE(config.vae)
    if config.vae.vae_weights is not None:
        path = SHIPPED if config.vae.vae_weights == "shipped" else Path(config.vae.vae_weights)
        # The scaling factor is no property of the weights, but of how diffusion is to see their latents.
        _load_trained(vae, path, "vae", free=("vae_weights", "scaling_factor"))
    return vae


def _load_trained(module: VideoVAE | TextEncoder, path: Path, part: str, *, free: Collection[str]) -> None:
    """Fill a part from a checkpoint folder, whose config of that part must agree in all but the keys `free`."""
    read_manifest(path)
    theirs = asdict(getattr(load(path / CONFIG), part))
    for key, ours in asdict(module.config).items():
        if key not in free and ours != theirs[key]:
            raise UserError(f"{part}.{key} is {ours!r}, but {path} was trained with {theirs[key]!r}; use that")
    load_part(module, path, part)


def load_part(module: nn.Module, path: Path, part: str) -> None:
    """Fill a part from a checkpoint folder: its averaged weights where the folder has them. Raises `UserError`."""
    averaged = f"{part}.ema"
    state = load_weights(path, averaged if averaged in read_manifest(path).parts else part)
    if part == "text":
        state = unpack_vocabulary(state)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"the {part} weights in {path} do not fit this config: {reason}") from error


def save_parts(
    path: str | Path,
    config: Config,
    modules: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype | None = None,
    info: Mapping[str, object] | None = None,
) -> None:
    """Write a checkpoint folder without trainer state; of a text tower trained here, only the tokens it saw."""
    weights = {part: module.state_dict() for part, module in modules.items()}
    if "text" in weights:
        weights["text"] = pack_vocabulary(weights["text"])
    for part, state in weights.items():
        weights[part] = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    save_checkpoint(path, config_yaml=to_yaml(config), weights=weights, info=dict(info or {}))


@dataclass(frozen=True)
class VideoOutput:
    """`frames`: "np" (B,T,H,W,3) and "pt" (B,T,3,H,W) in [0,1]; "latent" (B,C,T,h,w)."""

    frames: np.ndarray | Tensor


class TextToVideo:
    """A text-to-video model ready to use: `TextToVideo.from_pretrained()("Pushing a red ball from left to right")`."""

    def __init__(self, config: Config, parts: Components):
        self.config = config
        self.unet, self.vae = parts.unet, parts.vae
        self.text_encoder, self.schedule = parts.text_encoder, parts.schedule
        for module in parts.modules().values():
            module.eval()

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None) -> TextToVideo:
        """Load a checkpoint folder, on the CPU in float32; the shipped demo model where no path is given.

        Of a training checkpoint the averaged weights are taken. Raises `UserError` where the manifest is not valid.
        """
        path = SHIPPED if path is None else Path(path)
        verify(path)
        config = load(path / CONFIG)
        config = without_sources(config)
        parts = build_components(config)
        for part, module in parts.modules().items():
            load_part(module, path, part)
        return cls(config, parts)

    def save_pretrained(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint folder that `from_pretrained` reads, its floats as `dtype` (None: as they are)."""
        parts = Components(self.unet, self.vae, self.text_encoder, self.schedule)
        save_parts(path, self.config, parts.modules(), dtype=dtype)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextToVideo:
        """Move all parts; `dtype` is that of the UNet and the VAE, while text and noise stay in float32."""
        self.unet.to(device=device, dtype=dtype)
        self.vae.to(device=device, dtype=dtype)
        self.text_encoder.to(device)
        self.schedule.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        sampler: Literal["ddim", "ddpm"] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["np", "pt", "latent"] = "np",
    ) -> VideoOutput:
        """Make one clip for each prompt; what is not given comes from the config's `sampling` section.

        Args:
            negative_prompt: what to steer away from, one for all or one per prompt.
            height, width: pixels, divisible by the VAE's factor.
            generator: one for each clip, or one that all draw from in turn; without it the noise is random.
            latents: the noise to start from instead, (B, C, T, h, w).
            output_type: see `VideoOutput`.

        Raises `UserError` for an empty list of prompts, impossible sizes, or counts that do not match.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        given: dict[str, Any] = {
            "num_inference_steps": num_inference_steps, "num_frames": num_frames, "height": height, "width": width,
            "guidance_scale": guidance_scale, "eta": eta, "sampler": sampler,
        }  # fmt: skip
        options = replace(self.config.sampling, **{key: value for key, value in given.items() if value is not None})
        if output_type not in ("np", "pt", "latent"):
            raise UserError(f"output_type must be np, pt or latent, got {output_type!r}")
        shape = self._latent_shape(options)
        negative = options.negative_prompt if negative_prompt is None else negative_prompt
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if not prompts or len(negatives) != len(prompts):
            raise UserError(
                f"got {len(prompts)} prompts and {len(negatives)} negative ones; give at least one, and as many"
            )

        generators = _generators(generator, len(prompts))
        if latents is None:
            latents = initial_noise(shape, generators, self.device)
        elif latents.shape != (len(prompts), *shape):
            raise UserError(f"latents must be {(len(prompts), *shape)}, got {tuple(latents.shape)}")
        z = self._denoise(prompts, negatives, latents.to(self.device), options, generators)
        if output_type == "latent":
            return VideoOutput(z)
        video = torch.cat([self.vae.decode(one) for one in z.split(1)])  # one clip at a time: memory does not add up
        video = ((video + 1.0) / 2.0).clamp(0.0, 1.0).transpose(1, 2)  # (B,T,3,H,W)
        return VideoOutput(video if output_type == "pt" else video.permute(0, 1, 3, 4, 2).cpu().numpy())

    def _latent_shape(self, options: SamplingConfig) -> tuple[int, int, int, int]:
        factor, limit = self.vae.config.factor, self.config.model.max_num_frames
        for name in ("height", "width"):
            if getattr(options, name) % factor:
                raise UserError(f"{name}={getattr(options, name)} is not divisible by {factor}")
        if limit is not None and options.num_frames > limit:
            raise UserError(f"num_frames={options.num_frames} is more than this model's model.max_num_frames={limit}")
        channels = self.vae.config.latent_channels
        return channels, options.num_frames, options.height // factor, options.width // factor

    def _denoise(
        self,
        prompts: list[str],
        negatives: list[str],
        latents: Tensor,
        options: SamplingConfig,
        generators: list[torch.Generator],
    ) -> Tensor:
        uncond = None if options.guidance_scale == 1.0 else self.text_encoder(negatives)
        denoise = guided(
            self.unet,
            self.text_encoder(prompts),
            uncond,
            scale=options.guidance_scale,
            rescale=options.guidance_rescale,
        )
        steps = options.num_inference_steps
        if options.sampler == "ddpm":
            return ddpm_sample(denoise, latents, self.schedule, num_steps=steps, generators=generators)
        return ddim_sample(denoise, latents, self.schedule, num_steps=steps, eta=options.eta, generators=generators)


def _generators(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[torch.Generator]:
    if generator is None:
        fresh = torch.Generator()
        fresh.seed()
        return [fresh] * count
    if isinstance(generator, torch.Generator):
        return [generator] * count
    if len(generator) != count:
        raise UserError(f"got {len(generator)} generators for {count} prompts; give one for each")
    return list(generator)
