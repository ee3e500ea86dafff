"""Prompt -> video: the one place where text, UNet, VAE and schedule meet for sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vdm import dist
from vdm.components import SHIPPED, Components, build_components, fill_part, save_parts, states, without_sources
from vdm.config import Config
from vdm.diffusion import (
    SamplingConfig,
    ddim_sample,
    ddpm_sample,
    dpmpp_sample,
    guided,
    initial_noise,
    related_frames,
)
from vdm.errors import UserError
from vdm.interop import open_model
from vdm.interop.lora import merge_lora
from vdm.models.onednn import packed
from vdm.models.perturbed import perturbed
from vdm.replay import Replayed
from vdm.side_by_side import alone, side_by_side

__all__ = ["TextToVideo", "VideoOutput", "build_components"]


class VideoOutput(NamedTuple):
    """`frames`: "np" (B,T,H,W,3) and "pt" (B,T,3,H,W) in [0,1]; "pil" B lists of T images; "latent" (B,C,T,h,w)."""

    frames: Any


class TextToVideo:
    """A text-to-video model ready to use: `TextToVideo.from_pretrained()("Pushing a red ball from left to right")`."""

    def __init__(self, config: Config, parts: Components):
        self.config = config
        self.unet, self.vae = parts.unet, parts.vae
        self.text_encoder, self.schedule = parts.text_encoder, parts.schedule
        for module in parts.modules().values():
            module.eval()

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, *, variant: str | None = None) -> TextToVideo:
        """Load a model folder, on the CPU in float32; the shipped demo model where no path is given.

        The folder is one of ours (of a training checkpoint the averaged weights are taken), diffusers' (`variant`
        picks the files, "fp16" for instance) or the original ModelScope's. Raises `UserError` for anything else.
        """
        stored = open_model(SHIPPED if path is None else path, variant=variant)
        config = without_sources(stored.config)
        if config.model.attention_kernel == "triton":  # a matter of where it was trained
            config = replace(config, model=replace(config.model, attention_kernel="auto"))
        parts = build_components(config)
        for part, module in parts.modules().items():
            fill_part(module, stored, part)
        return cls(config, parts)

    def save_pretrained(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint folder that `from_pretrained` reads, its floats as `dtype` (None: as they are)."""
        parts = Components(self.unet, self.vae, self.text_encoder, self.schedule)
        save_parts(path, self.config, states(parts.modules()), dtype=dtype)

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

    def load_lora(self, path: str | Path, *, scale: float = 1.0) -> int:
        """Merge a LoRA file into the UNet, and the text tower where it has layers of that; returns how many layers.

        `path` is a file, or a folder with one, named as PEFT, diffusers or Kohya name them. Raises `UserError`.
        """
        return merge_lora(self.unet, self.text_encoder, path, scale=scale)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        sampler: Literal["ddim", "ddpm", "dpmpp"] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        video: np.ndarray | Tensor | Sequence[Any] | None = None,
        strength: float = 0.6,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: Literal["np", "pt", "pil", "latent"] = "np",
        return_dict: bool = True,
        callback: Callable[[int, int, Tensor], None] | None = None,
        callback_steps: int = 1,
    ) -> VideoOutput:
        """Make one clip for each prompt; what is not given comes from the config's `sampling` section.

        Names and meaning are those of diffusers' TextToVideoSDPipeline and VideoToVideoSDPipeline, of which
        cross_attention_kwargs (processors of its attention) and clip_skip (our tower ends where it is read) have no
        counterpart; of a clip to start from the mean latents are taken, and not a draw.

        Args:
            negative_prompt: what to steer away from, one for all or one per prompt.
            height, width: pixels, divisible by the VAE's factor.
            guidance_scale: up to 1 is without guidance.
            eta: of the ddim sampler, 0 to 1.
            generator: one for each clip, or one that draws all at once, in float32; torch's own without it.
            latents: the noise to start from instead, (B, C, T, h, w); it says the sizes that are not given.
            video: a clip to start from, or one for each prompt, as `VideoOutput` has them (not as latents), or in
                uint8; it says the sizes that are not given (SDEdit, Meng et al. 2022, arXiv 2108.01073).
            strength: of all steps, the share that is taken from there, in (0, 1]: the larger, the less of it is left.
            prompt_embeds, negative_prompt_embeds: contexts (B, L, D) in place of prompts, as `text_encoder` makes them.
            output_type: see `VideoOutput`.
            return_dict: the result has a name for its frames and is the tuple (frames,), so either will do.
            callback: called as callback(step, timestep, latents) after every callback_steps-th step, from the first.

        Raises `UserError` for an empty list of prompts, impossible sizes, or counts that do not match.
        """
        clips = None if video is None else as_clips(video)
        options = self._options(
            latents, clips, num_inference_steps=num_inference_steps, num_frames=num_frames, height=height, width=width,
            guidance_scale=guidance_scale, eta=eta, sampler=sampler,
        )  # fmt: skip
        _require_sound(options, eta=eta, output_type=output_type, callback_steps=callback_steps)
        cond, uncond = self._context(prompt, prompt_embeds), None
        if options.guidance_scale > 1.0:
            uncond = self._negative(negative_prompt, negative_prompt_embeds, cond, default=options.negative_prompt)
        z, skip = self._start(generator, latents, (len(cond), *self._latent_shape(options))), 0
        if clips is not None:
            z, skip = self._noised(clips, z, options.num_inference_steps, strength)
        generators, report = _one_each(generator, len(cond)), _every(callback_steps, callback)
        with packed(self.unet):
            z = self._denoise(cond, uncond, z, options, generators, report, skip)
        return VideoOutput(self._frames(z, output_type))

    def _options(self, latents: Tensor | None, clips: Tensor | None, **given: Any) -> SamplingConfig:
        """The config's `sampling` section with what is given; sizes that are not are those of the latents or clips."""
        known = {key: value for key, value in given.items() if value is not None}
        for key in ("num_inference_steps", "num_frames", "height", "width"):
            if not isinstance(known.get(key, 1), int):
                raise UserError(f"{key} must be a whole number, got {known[key]!r}")
        _require_tensor("latents", latents)
        if latents is not None:
            channels, factor = self.vae.config.latent_channels, self.vae.config.factor
            if latents.dim() != 5 or latents.shape[1] != channels:
                raise UserError(f"latents must be (B, {channels}, T, h, w), got {tuple(latents.shape)}")
            frames, height, width = latents.shape[2:]
            known = {"num_frames": frames, "height": height * factor, "width": width * factor, **known}
        if clips is not None:
            known = {**dict(zip(("num_frames", "height", "width"), clips.shape[2:], strict=True)), **known}
        return replace(self.config.sampling, **known)

    def _context(self, prompt: str | Sequence[str] | None, embeds: Tensor | None) -> Tensor:
        """The context (B, L, D) of prompts, or the one that is given instead."""
        if embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt or []
            if not isinstance(prompts, list | tuple) or not all(isinstance(one, str) for one in prompts):
                raise UserError(f"a prompt is a text or a list of texts, got {prompt!r}")
            if not prompts:
                raise UserError("got 0 prompts; give at least one, or prompt_embeds")
            return self.text_encoder(prompts)
        if prompt is not None:
            raise UserError("give prompt or prompt_embeds, not both")
        _require_tensor("prompt_embeds", embeds)
        if embeds.dim() != 3 or embeds.shape[2] != self.config.model.context_dim or not len(embeds):
            wanted = f"(B, L, {self.config.model.context_dim})"
            raise UserError(f"prompt_embeds must be {wanted}, got {tuple(embeds.shape)}")
        return embeds.to(self.device)

    def _negative(
        self, prompt: str | Sequence[str] | None, embeds: Tensor | None, cond: Tensor, *, default: str
    ) -> Tensor:
        """The context of what to steer away from, for each row of `cond`; that of `default` where nothing is given."""
        if prompt is None and embeds is None:
            prompt = default
        uncond = self._context([prompt] * len(cond) if isinstance(prompt, str) else prompt, embeds)
        if len(uncond) != len(cond):
            raise UserError(f"got {len(cond)} prompts and {len(uncond)} negative ones; give as many, or one text")
        if uncond.shape != cond.shape:
            raise UserError(f"prompts {tuple(cond.shape)} and negative ones {tuple(uncond.shape)} differ in length")
        return uncond

    def _start(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
        shape: tuple[int, ...],
    ) -> Tensor:
        """The noise that sampling starts from."""
        if latents is not None:
            if latents.shape != shape:
                raise UserError(f"latents must be {shape}, got {tuple(latents.shape)}")
            return latents.to(self.device)
        if generator is None or isinstance(generator, torch.Generator):
            noise = initial_noise(shape, _one_each(generator, 1), self.device)[0]
        else:
            noise = initial_noise(shape[1:], _one_each(generator, shape[0]), self.device)
        return related_frames(noise, _one_each(generator, shape[0]), self._correlation)

    def _noised(self, clips: Tensor, noise: Tensor, num_steps: int, strength: float) -> tuple[Tensor, int]:
        """Clips (B or 1, 3, T, H, W), encoded, as they are at the first step that is taken from there, with this noise
        (B, C, T, h, w); and how many steps come before it."""
        times = self.schedule.timesteps(num_steps).to(self.device)
        if not 0.0 < strength <= 1.0 or not int(len(times) * strength):
            count = f"{len(times)} step" + "s" * (len(times) > 1)
            raise UserError(f"strength is {strength}, of {count}; it must be above 0, at most 1, and enough for a step")
        skip = len(times) - int(len(times) * strength)
        wanted = (noise.shape[2], *(self.vae.config.factor * side for side in noise.shape[3:]))
        if len(clips) not in (1, len(noise)) or tuple(clips.shape[2:]) != wanted:
            have = f"{len(clips)} clips of {tuple(clips.shape[2:])}, for {len(noise)} of {wanted}"
            raise UserError(f"video is {have} (frames, height, width); give one, or as many, of that size")
        z = side_by_side(lambda video: self.vae.encode(video).mode())(clips.to(self.device))
        return self.schedule.add_noise(z.expand_as(noise), noise, times[skip].expand(len(noise))), skip

    @property
    def _correlation(self) -> float:
        """Between the frames of the noise that the model was trained with, and is to start from."""
        return self.config.training.frame_noise_correlation

    def _frames(self, z: Tensor, output_type: str) -> np.ndarray | Tensor | list[list[Any]]:
        if output_type == "latent":
            return z
        video = side_by_side(partial(self.vae.decode, tile=self.config.sampling.vae_tile))(z)
        video = ((video + 1.0) / 2.0).clamp(0.0, 1.0).transpose(1, 2)  # (B,T,3,H,W)
        if output_type == "pt":
            return video
        array = video.permute(0, 1, 3, 4, 2).cpu().float().numpy()
        if output_type == "np":
            return array
        from PIL import Image  # comes with open_clip

        return [[Image.fromarray(frame) for frame in clip] for clip in (array * 255).round().astype(np.uint8)]

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
        cond: Tensor,
        uncond: Tensor | None,
        latents: Tensor,
        options: SamplingConfig,
        generators: list[torch.Generator],
        callback: Callable[[int, int, Tensor], None] | None,
        skip: int,
    ) -> Tensor:
        scale = 1.0 if uncond is None else options.guidance_scale
        replays = options.cuda_graph and self.device.type == "cuda" and dist.size() == 1
        unet, again = (Replayed(self.unet, self.device) if replays else side_by_side(self.unet) for _ in range(2))
        denoise = guided(
            unet, cond, uncond, scale=scale, rescale=options.guidance_rescale, at_once=options.guidance_at_once,
            perturbed=perturbed(self.unet, again, layers=options.pag_layers), pag_scale=options.pag_scale,
        )  # fmt: skip
        steps = options.num_inference_steps
        shared: dict[str, Any] = {"num_steps": steps, "callback": callback, "skip": skip}
        with alone(latents):
            if options.sampler == "dpmpp":
                return dpmpp_sample(denoise, latents, self.schedule, **shared)
            shared |= {"generators": generators, "correlation": self._correlation}
            if options.sampler == "ddpm":
                return ddpm_sample(denoise, latents, self.schedule, **shared)
            return ddim_sample(denoise, latents, self.schedule, eta=options.eta, **shared)


def _require_sound(options: SamplingConfig, *, eta: float | None, output_type: object, callback_steps: object) -> None:
    if eta and options.sampler != "ddim":
        raise UserError(f"eta is not for the sampler {options.sampler}; leave it out, or sample with ddim")
    if output_type not in ("np", "pt", "pil", "latent"):
        raise UserError(f"output_type must be np, pt, pil or latent, got {output_type!r}")
    if not isinstance(callback_steps, int) or callback_steps < 1:
        raise UserError(f"callback_steps must be at least 1, got {callback_steps}")


def as_clips(video: object) -> Tensor:
    """Clips as `VideoOutput` has them, but for latents, or in uint8; one, or several -> (B,3,T,H,W) in [-1,1].

    Raises UserError for anything else.
    """
    try:
        clips = video if isinstance(video, Tensor) else torch.from_numpy(_as_array(video)).movedim(-1, -3)
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"video must be an array, a tensor or a list of frames ({error})") from error
    clips = clips[None] if clips.dim() == 4 else clips
    if clips.dim() != 5 or clips.shape[2] != 3 or 0 in clips.shape:
        raise UserError(f"video must be an array (B, T, H, W, 3) or a tensor (B, T, 3, H, W), got {tuple(clips.shape)}")
    values = clips / 255.0 if clips.dtype == torch.uint8 else clips.float()
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise UserError("video must be of uint8, or of floats in [0, 1]")
    return values.transpose(1, 2) * 2.0 - 1.0


def _as_array(video: object) -> np.ndarray:
    """Of pictures, and lists of them; in memory as NumPy puts it down."""
    if isinstance(video, list | tuple):
        return np.stack([_as_array(one) for one in video])
    return np.ascontiguousarray(video)


def _every(
    count: int, callback: Callable[[int, int, Tensor], None] | None
) -> Callable[[int, int, Tensor], None] | None:
    if callback is None:
        return None

    return lambda index, t, x: callback(index, t, x) if index % count == 0 else None


def _one_each(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[torch.Generator]:
    if generator is None or isinstance(generator, torch.Generator):
        return [torch.default_generator if generator is None else generator] * count
    if not isinstance(generator, list | tuple) or not all(isinstance(one, torch.Generator) for one in generator):
        raise UserError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
    if len(generator) != count:
        raise UserError(f"got {len(generator)} generators for {count} prompts; give one for each")
    return list(generator)


def _require_tensor(name: str, value: object) -> None:
    if value is not None and not isinstance(value, Tensor):
        raise UserError(f"{name} must be a torch.Tensor, got a {type(value).__name__}")
