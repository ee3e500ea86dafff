"""From noise to a clip: free functions of a denoiser, in float32, each clip with its own random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vdm.diffusion.noise import related_noise
from vdm.diffusion.schedule import NoiseSchedule
from vdm.errors import UserError

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x (B, ...), t (B,)) -> the network's prediction (B, ...)
Callback = Callable[[int, int, Tensor], None]  # (index of the step, its t, x after it)


@dataclass(frozen=True)
class SamplingConfig:
    """How previews and `sample.py` make clips unless told otherwise; sizes in pixels, eta for the ddim sampler only.

    pag_scale: perturbed-attention guidance (0 is none), which makes one more prediction a step; pag_layers: where.
    guidance_at_once: the guided and the unguided prediction are one batch; apart they take half the memory.
    vae_tile: decode in blended squares of so many latents, for frames too large for memory; null decodes whole frames.
    cuda_graph: on one GPU, record the UNet's kernels once and replay them at each step; elsewhere it changes nothing.
    """

    num_frames: int = 16
    height: int = 256
    width: int = 256
    sampling_fps: float = 8.0
    num_inference_steps: int = 50
    sampler: Literal["ddim", "ddpm", "dpmpp"] = "ddim"
    eta: float = 0.0
    guidance_scale: float = 9.0
    guidance_rescale: float = 0.0
    pag_scale: float = 0.0
    pag_layers: Literal["middle", "all"] = "middle"
    negative_prompt: str = ""
    guidance_at_once: bool = True
    vae_tile: int | None = None
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_frames", 1), ("height", 1), ("width", 1), ("num_inference_steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        if self.vae_tile is not None and self.vae_tile < 8:
            raise UserError(f"vae_tile is {self.vae_tile}; it must be 8 latents or more, or null")
        if not 0.0 < self.sampling_fps < math.inf:
            raise UserError(f"sampling_fps is {self.sampling_fps}; it must be positive, such as 8")
        if self.sampler not in ("ddim", "ddpm", "dpmpp"):
            raise UserError(f"sampler is {self.sampler!r}; it must be one of ddim, ddpm, dpmpp")
        _check_eta(self.eta)
        if not math.isfinite(self.guidance_scale):
            raise UserError(f"guidance_scale is {self.guidance_scale}; it must be a finite number, such as 9")
        if not 0.0 <= self.pag_scale < math.inf:
            raise UserError(f"pag_scale is {self.pag_scale}; it must be 0 (off) or more, such as 0.5")
        if self.pag_layers not in ("middle", "all"):
            raise UserError(f"pag_layers is {self.pag_layers!r}; it must be middle or all")
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise UserError(f"guidance_rescale is {self.guidance_rescale}; it must lie in 0 to 1, and 0 turns it off")


def _check_eta(eta: float) -> None:
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta is {eta}; it must lie in 0 (deterministic) to 1 (as random as ddpm)")


def initial_noise(
    shape_of_one: Sequence[int], generators: Sequence[torch.Generator], device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise (B, *shape_of_one) float32: clip i from generators[i] alone, whatever the batch.

    It is drawn on the generator's own device (the CPU, so that a seed means the same clip on every machine).
    """
    draws = [torch.randn(tuple(shape_of_one), generator=one, device=one.device) for one in generators]
    return torch.stack([draw.to(device) for draw in draws])


@torch.no_grad()
def ddim_sample(
    denoise: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    callback: Callback | None = None,
    correlation: float = 0.0,
    skip: int = 0,
) -> Tensor:
    """Denoise x (B, ...), standard normal, to x0 (B, ...) float32 by DDIM (Song et al. 2021, eq. 12 and 16).

    eta goes from 0, deterministic, to 1, where each step has the distribution of `ddpm_sample`'s; above 0 it needs one
    generator a clip, and `correlation` is that of its noise between frames, see `related_noise`. Which timesteps there
    are and where each step leads, the schedule's config says. x in float64 is denoised in float64. With `skip` the
    first so many steps are left out, and x is a clip noised to the next (SDEdit, Meng et al. 2022, arXiv 2108.01073).
    Raises UserError for an eta outside [0, 1], too many steps, or generators that are missing or do not match x.
    """
    _check_eta(eta)
    generators = _one_each(generators, x) if eta > 0.0 else None
    x = _lifted(x)
    path = schedule.transitions(num_steps, end=schedule.final_alpha_cumprod, stride=schedule.config.ddim_stride)[skip:]
    for index, (t, now, then) in enumerate(path):
        x0, eps = _predict(denoise, x, schedule, t, now)
        variance = eta**2 * _posterior_variance(now, then)
        x = math.sqrt(then) * x0 + math.sqrt(1.0 - then - variance) * eps
        x = _add_step_noise(x, variance, generators, correlation)
        if callback is not None:
            callback(index, t, x)
    return x


@torch.no_grad()
def ddpm_sample(
    denoise: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int,
    generators: Sequence[torch.Generator] | None,
    callback: Callback | None = None,
    correlation: float = 0.0,
    skip: int = 0,
) -> Tensor:
    """Denoise x (B, ...), standard normal, to x0 (B, ...) float32 by ancestral sampling (Ho et al. 2020, eq. 6-7).

    The posterior q(x_s | x_t, x0) with its own ("fixed small") variance, over any subset of the steps, one generator a
    clip; `correlation` and `skip` are as in `ddim_sample`. It always ends on a clean clip, as diffusers' DDPMScheduler
    does: set_alpha_to_one is of DDIM alone.
    Raises UserError for too many steps, or generators that are missing or do not match x.
    """
    generators = _one_each(generators, x)
    x = _lifted(x)
    for index, (t, now, then) in enumerate(schedule.transitions(num_steps, end=1.0)[skip:]):
        x0, _ = _predict(denoise, x, schedule, t, now)
        alpha = _of_this_step(now, then)  # 0 when x is pure noise, and then x0 is all that counts
        x = math.sqrt(then) * (1.0 - alpha) / (1.0 - now) * x0 + math.sqrt(alpha) * (1.0 - then) / (1.0 - now) * x
        x = _add_step_noise(x, _posterior_variance(now, then), generators, correlation)
        if callback is not None:
            callback(index, t, x)
    return x


@torch.no_grad()
def dpmpp_sample(
    denoise: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int,
    callback: Callback | None = None,
    skip: int = 0,
) -> Tensor:
    """Denoise x (B, ...), standard normal, to x0 (B, ...) float32 by DPM-Solver++(2M), which is deterministic.

    Lu et al. 2022, arXiv 2211.01095, algorithm 2: x0 along a step is extrapolated from this step's and the last one's,
    on the axis of half the log-SNR. The first step is of first order, and so is the last one, which ends on a clean
    clip, infinitely far on that axis. `skip` is as in `ddim_sample`. Raises UserError for too many steps.
    """
    x = _lifted(x)
    before: tuple[Tensor, float] | None = None  # x0 of the last step, and how long that was
    for index, (t, now, then) in enumerate(schedule.transitions(num_steps, end=1.0)[skip:]):
        x0, _ = _predict(denoise, x, schedule, t, now)
        step = 0.0 if now == then else _half_log_snr(then) - _half_log_snr(now)
        estimate = x0
        if before is not None and then < 1.0:
            estimate = x0 + (x0 - before[0]) * (step / before[1] / 2.0)  # from pure noise the last step was endless
        # Eq. 17, whose e^-h is this ratio, also where h is endless.
        decay = math.sqrt(_of_this_step(now, then) * (1.0 - then) / (1.0 - now))
        x = math.sqrt((1.0 - then) / (1.0 - now)) * x + math.sqrt(then) * (1.0 - decay) * estimate
        if step > 0.0:  # a step that stays where it is says nothing of the way
            before = x0, step
        if callback is not None:
            callback(index, t, x)
    return x


def _half_log_snr(alpha_bar: float) -> float:
    if alpha_bar in (0.0, 1.0):
        return math.inf if alpha_bar else -math.inf
    return 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar))


def _lifted(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def _predict(denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, t: int, alpha_bar: float) -> tuple[Tensor, Tensor]:
    """(x0, limited as the config says; eps, never limited)."""
    output = denoise(x, torch.full((x.shape[0],), t, dtype=torch.long, device=x.device)).to(x.dtype)
    amplitudes = {"signal": math.sqrt(alpha_bar), "noise": math.sqrt(1.0 - alpha_bar)}
    x0, eps = schedule.predictions_at(output, x, **amplitudes)
    config = schedule.config
    if config.thresholding:
        frames = x0.transpose(1, 2).flatten(2) if x0.ndim == 5 else x0.flatten(1)  # (B,T,C*h*w), or (B,*)
        limit = torch.quantile(frames.abs(), config.dynamic_thresholding_ratio, dim=-1)
        limit = limit.clamp(1.0, config.sample_max_value)
        limit = limit[:, None, :, None, None] if x0.ndim == 5 else limit.reshape(-1, *[1] * (x0.ndim - 1))
        x0 = x0.clamp(-limit, limit) / limit
    elif config.clip_sample:
        x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
    return x0, eps


def _posterior_variance(now: float, then: float) -> float:
    """Variance of q(x_then | x_now, x0), both given by alpha_bar (Ho et al. 2020, eq. 7); 0 when then is clean.

    now / then >= now, so in this order of operations rounding cannot take it above 1 - then.
    """
    return (1.0 - then) * ((1.0 - _of_this_step(now, then)) / (1.0 - now))


def _of_this_step(now: float, then: float) -> float:
    """alpha from then to now; a step that stays where it is, be it in pure noise, changes nothing."""
    return 1.0 if now == then else now / then


def _add_step_noise(
    x: Tensor, variance: float, generators: Sequence[torch.Generator] | None, correlation: float
) -> Tensor:
    if generators is None:
        return x
    noise = _step_noise(x.shape[1:], generators, x.device)
    if correlation:
        noise = related_frames(noise, generators, correlation)
    return x + math.sqrt(variance) * noise


def related_frames(noise: Tensor, generators: Sequence[torch.Generator], correlation: float) -> Tensor:
    """`related_noise` of every clip of (B, C, T, h, w) by its generator."""
    clips = zip(noise, generators, strict=True)
    return torch.stack([related_noise(clip, one, correlation=correlation) for clip, one in clips])


def _step_noise(shape: torch.Size, generators: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """As `initial_noise`, but that of a video is drawn frame by frame, as diffusers' pipeline does."""
    if len(shape) != 4:
        return initial_noise(shape, generators, device)
    C, T, h, w = shape
    return initial_noise((T, C, h, w), generators, device).transpose(1, 2)


def _one_each(generators: Sequence[torch.Generator] | None, x: Tensor) -> Sequence[torch.Generator]:
    if generators is None:
        raise UserError("random sampling steps need one torch.Generator a clip; pass generators, or ddim with eta 0")
    if len(generators) != x.shape[0]:
        raise UserError(f"there are {len(generators)} generators for {x.shape[0]} clips; pass one for each")
    return generators
