"""NOISE MATH: schedules, the training loss, guidance and samplers; functions of tensors, with no model in sight."""

from __future__ import annotations

from vdm.diffusion.guidance import guided, rescale_guidance
from vdm.diffusion.loss import ddpm_loss, weighted_mse
from vdm.diffusion.noise import related_noise
from vdm.diffusion.samplers import (
    SamplingConfig,
    ddim_sample,
    ddpm_sample,
    dpmpp_sample,
    initial_noise,
    related_frames,
)
from vdm.diffusion.schedule import DiffusionConfig, NoiseSchedule

__all__ = [
    "DiffusionConfig",
    "NoiseSchedule",
    "SamplingConfig",
    "ddim_sample",
    "ddpm_loss",
    "ddpm_sample",
    "dpmpp_sample",
    "guided",
    "initial_noise",
    "related_frames",
    "related_noise",
    "rescale_guidance",
    "weighted_mse",
]
