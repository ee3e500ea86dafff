"""`train.py CONFIG --plan`: what a run will take, before it takes anything: memory, time, disk, and what is amiss."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vdm import flops
from vdm.config import Config
from vdm.footprint import AVERAGES, GRADIENTS, OPTIMIZER, Footprint, footprint
from vdm.training.cached import reads_text
from vdm.training.limits import Limits

GIB = 2**30
CONTEXT = "CUDA context and workspaces"
CONTEXT_BYTES = GIB  # assumed: 0.5 of the context, and as much for cuDNN and cuBLAS
SHARDED = (GRADIENTS, OPTIMIZER, AVERAGES, "weights of unet")


@dataclass(frozen=True)
class GPU:
    """Dense TFLOP/s of the data sheet with float32 sums: of half precision and of float32; and GiB that torch finds."""

    half: float
    full: float
    gib: float

    def tflops(self, mixed_precision: str) -> float:
        return self.full if mixed_precision == "no" else self.half


GPUS: Mapping[str, GPU] = {
    "A100": GPU(312.0, 19.5, 79.1),  # SXM, 80 GB
    "H100": GPU(989.0, 67.0, 79.1),  # SXM, 80 GB
    "H200": GPU(989.0, 67.0, 139.8),
    "4090": GPU(165.2, 82.6, 23.5),
    "3090": GPU(71.0, 35.6, 23.5),
    "A100-40": GPU(312.0, 19.5, 39.4),
    "A6000": GPU(154.8, 38.7, 47.4),
    "L40S": GPU(362.0, 91.6, 44.3),
    "4080": GPU(97.5, 48.7, 15.6),
    "4070": GPU(58.3, 29.1, 11.6),
    "3060": GPU(25.3, 12.7, 11.6),
}


@dataclass(frozen=True)
class Work:
    """TFLOP of one optimizer step of one process, with clips of the mean length."""

    forward: float  # of what learns
    backward: float
    again: float  # computed again in the backward pass
    frozen: float  # the VAE's encoder, a text tower that does not learn

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.again + self.frozen


@dataclass(frozen=True)
class Disk:
    """Bytes."""

    checkpoint: int
    kept: int  # checkpoints, at most, at the end
    final: int
    cache: int | None  # of latents, where the config names one and the number of clips is known
    free: int

    @property
    def run(self) -> int:
        """What the run folder comes to, with one checkpoint more, for a moment."""
        return self.checkpoint * (self.kept + 1) + self.final


@dataclass(frozen=True)
class Plan:
    """All that is known before a run; bytes of memory are those of one process."""

    config: Config
    footprint: Footprint
    work: Work
    disk: Disk
    mfu: float
    advice: Mapping[str, tuple[str, ...] | None]  # for a GPU on which it does not fit: changes that help, if any do
    warnings: tuple[str, ...]

    @property
    def phases(self) -> dict[str, dict[str, int]]:
        """Bytes by kind at the peak of each phase, the assumed ones too."""
        return {phase: {**kinds, CONTEXT: CONTEXT_BYTES} for phase, kinds in held(self.config, self.footprint).items()}

    @property
    def peak(self) -> int:
        return max(sum(kinds.values()) for kinds in self.phases.values())

    def fits(self, name: str) -> bool:
        return self.peak <= GPUS[name].gib * GIB

    def seconds(self, name: str) -> float:
        """Of a step on a GPU."""
        return self.work.total / (GPUS[name].tflops(self.config.training.mixed_precision) * self.mfu)


def held(config: Config, measured: Footprint) -> dict[str, dict[str, int]]:
    """The phases of a footprint as one of several processes has them, which may share what is trained."""
    processes = (config.training.num_gpus or 1) if config.training.parallel == "fsdp" else 1
    return {
        phase: {kind: -(-size // processes) if kind in SHARDED else size for kind, size in kinds.items()}
        for phase, kinds in measured.phases.items()
    }


def fits(config: Config, name: str) -> bool:
    """Whether a run fits into a GPU."""
    phases = held(config, footprint(config))
    return max(sum(kinds.values()) for kinds in phases.values()) + CONTEXT_BYTES <= GPUS[name].gib * GIB


def work_of(config: Config, measured: Footprint) -> Work:
    """Counted on the run's own code; the split of it by the forward passes of the parts alone."""
    data, training, clips = config.data, config.training, config.training.batch_size
    length, mean = data.max_frames, (data.min_frames + data.max_frames) / 2
    encode = 0 if data.cache_dir or data.cache_latents else clips * flops.vae_encode(config, num_frames=length)
    text = 0 if training.task == "vae" else clips * flops.text_forward(config)
    forward, frozen = 0, 0
    if training.task == "vae":
        forward = encode + clips * flops.vae_decode(config, num_frames=length)
    elif training.task == "text":
        forward, frozen = text, encode
    else:
        forward, frozen = clips * flops.unet_forward(config, num_frames=length), encode
        if config.text.text_trainable:
            forward += text
        elif data.cache_dir is None:
            frozen += text
    passes = 2 if config.training.lora_rank is None else 1  # most of a LoRA's model needs no gradients of its weights
    backward = max(0, min(passes * forward, measured.step_flops - frozen - forward))
    again = max(0, measured.step_flops - frozen - forward - backward)
    if training.gradient_checkpointing == "none":
        backward, again = backward + again, 0
    scale = training.gradient_accumulation_steps * mean / length / 1e12
    return Work(*(scale * count for count in (forward, backward, again, frozen)))


def steps_of(config: Config) -> int:
    """How many a run takes, as far as that is known before its clips are."""
    training, clips = config.training, config.data.num_clips
    if training.max_train_epochs is None or clips is None:
        return training.max_train_steps
    per_step = training.batch_size * training.gradient_accumulation_steps * (training.num_gpus or 1)
    return Limits.of(training, num_clips=clips, clips_per_step=per_step).steps


def disk_of(config: Config, measured: Footprint) -> Disk:
    """What a run leaves on the disk, and how much of it is free."""
    training = config.training
    steps = steps_of(config)
    made = math.ceil(steps / training.checkpointing_steps)
    kept = made
    if training.keep_checkpoints is not None:
        often = steps // training.keep_every if training.keep_every is not None else 0
        kept = min(made, training.keep_checkpoints + often + training.keep_best)
    there = next(folder for folder in (Path(config.run_dir).absolute(), *Path(config.run_dir).absolute().parents)
                 if folder.is_dir())  # fmt: skip
    size = sum(measured.checkpoint.values())
    return Disk(size, kept, measured.final, cache_bytes(config), shutil.disk_usage(there).free)


def cache_bytes(config: Config) -> int | None:
    """The most that `vdm data cache` will write for it in fp16, with one text a clip and look."""
    data, vae = config.data, config.vae
    clips = data.num_clips or (10000 if data.format == "mini-something" else None)
    if data.cache_dir is None or clips is None:
        return None
    looks = data.cache_crops * (2 if data.horizontal_flip else 1)
    latents = 2 * vae.latent_channels * data.max_frames * (data.height // vae.factor) * (data.width // vae.factor)
    texts = config.text.context_length * config.text.text_width if reads_text(config) else 0
    return 2 * (latents * (clips * looks + data.validation_clips) + texts * clips * (2 if data.horizontal_flip else 1))


def as_json(plan: Plan, names: tuple[str, ...]) -> dict[str, object]:
    """Everything in a plan, in bytes, TFLOP and seconds."""
    steps = steps_of(plan.config)
    return {
        "config": asdict(plan.config),
        "parameters": dict(plan.footprint.parameters),
        "trained": dict(plan.footprint.trained),
        "memory": plan.phases,
        "peak": plan.peak,
        "tflop_per_step": {**asdict(plan.work), "total": plan.work.total},
        "mfu": plan.mfu,
        "gpus": {
            name: {
                "fits": plan.fits(name),
                "seconds_per_step": plan.seconds(name),
                "hours": plan.seconds(name) * steps / 3600,
                "to_fit": plan.advice.get(name),
            }
            for name in names
        },
        "disk": {**asdict(plan.disk), "run": plan.disk.run, "files": dict(plan.footprint.checkpoint)},
        "warnings": list(plan.warnings),
    }
