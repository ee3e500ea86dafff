"""The `training` section of a config: every number of the recipe that is neither the model nor the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from vdm.errors import UserError

Recompute = Literal["none", "cheap", "block"]
AUTOCAST = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of `mixed_precision`


@dataclass(frozen=True)
class TrainingConfig:
    """How a run is trained. A step is an optimizer step: batch_size x gradient_accumulation_steps x processes clips."""

    # "unet" trains the UNet, and the text tower where that is trainable; "text" trains the text tower against clips
    task: Literal["unet", "vae", "text"] = "unet"
    batch_size: int = 4  # clips per process and micro-step
    gradient_accumulation_steps: int = 1
    effective_batch_size: int | None = None  # only checked: clips per step over all processes
    num_gpus: int | None = None  # only checked; null counts as one process
    init_from: str | None = None  # checkpoint folder whose weights the run starts from

    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    spatial_learning_rate: float | None = None  # of the UNet's spatial layers; null is learning_rate, 0 freezes them
    temporal_learning_rate: float | None = None  # of its temporal layers; in task "vae" both are of the autoencoder's
    text_learning_rate: float | None = None  # of a text tower that is trained
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    min_learning_rate: float = 0.0  # where a decay of learning_rate ends; those of other layers keep their proportion
    decay_share: float = 0.2  # lr_scheduler "wsd" (warm-up, stable, decay): the last part after it, in which it falls
    warmup_steps: int = 0
    max_train_steps: int = 1000
    max_train_epochs: float | None = None  # whichever limit comes first ends the run, and the decay fits it
    max_train_hours: float | None = None  # of training, validation and previews included, over all restarts
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999  # 0 makes the averaged weights the weights themselves
    caption_dropout: float = 0.1  # share of captions replaced by the null prompt, for classifier-free guidance

    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"  # task "unet": how often each time step is drawn
    logit_mean: float = 0.0  # of "logit_normal": below 0 draws more steps of little noise, above 0 more of much,
    logit_std: float = 1.0  # and the wider, the more of both ends

    offset_noise: float = 0.0  # task "unet": strength of noise that is one number for each channel of a clip
    frame_noise_correlation: float = 0.0  # share of the noise's variance that all frames of a clip have in common

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    # What the backward pass computes again: nothing, norms and activations alone, or whole UNet layers (true)
    gradient_checkpointing: bool | Recompute = "none"
    weights_dtype: Literal["fp32", "bf16"] = "fp32"  # of trained parts; bf16 is updated with stochastic rounding
    optimizer_states: Literal["fp32", "bf16", "8bit"] = "fp32"  # how AdamW keeps its moments
    optimizer_in_backward: bool = False  # update each weight as soon as its gradient is there, which is then freed
    ema_offload: bool = False  # keep averaged weights in the memory of the CPU
    compile: bool = False  # torch.compile each block of the trained parts, for each length of clips
    cuda_graph: bool = False  # on a GPU, task "unet": replay the UNet's kernels, which pays where they are small
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several processes: copies of the model, or shards of it
    lora_rank: int | None = None  # train a low-rank change of the UNet's attention in place of its weights
    lora_alpha: float | None = None  # its strength is alpha / rank; null is the rank

    kl_weight: float = 1e-6  # task "vae": weight of the KL term beside the reconstruction error
    colour_weight: float = 0.0  # task "vae": weight of the error of the colour alone, without its grey
    edge_weight: float = 0.0  # task "vae": weight of the error of the image gradients, which keeps edges sharp

    rehearsal: bool = True  # before the long loop validate, preview, take the first step and save, all at full size
    log_steps: int = 10
    checkpointing_steps: int = 5000
    keep_checkpoints: int | None = None  # null keeps all, else the newest so many, and
    keep_every: int | None = None  # those of every so many steps, and
    keep_best: bool = False  # the one whose last validation had the lowest loss
    save_in_background: bool | None = None  # write checkpoints while training goes on; null does on a GPU
    stop_after_steps: int | None = None  # end there with a checkpoint, on the way to `max_train_steps`
    max_bad_steps: int = 5  # so many in a row that are not finite, and the run goes back to its last checkpoint
    validation_steps: int = 1000  # 0 never validates
    diagnostics: bool = True  # validation asks too what the order of frames and the captions count; thrice the cost
    preview_steps: int = 0  # 0 means together with each validation
    preview_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation_steps", "effective_batch_size", "num_gpus"):
            self._require(name, at_least=1)
        for name in ("max_train_steps", "log_steps", "checkpointing_steps", "keep_checkpoints", "keep_every"):
            self._require(name, at_least=1)
        for name in ("stop_after_steps", "max_bad_steps", "lora_rank"):
            self._require(name, at_least=1)
        for name in (
            "warmup_steps",
            "validation_steps",
            "preview_steps",
            "weight_decay",
            "kl_weight",
            "colour_weight",
            "edge_weight",
            "spatial_learning_rate",
            "temporal_learning_rate",
            "text_learning_rate",
            "min_learning_rate",
            "offset_noise",
        ):
            self._require(name, at_least=0)
        for name in (
            "logit_std",
            "learning_rate",
            "epsilon",
            "max_grad_norm",
            "max_train_epochs",
            "max_train_hours",
            "lora_alpha",
        ):
            self._require(name, above=0)
        for name in ("adam_beta1", "adam_beta2", "ema_decay", "frame_noise_correlation"):
            self._require(name, at_least=0, below=1)
        for name in ("caption_dropout", "decay_share"):
            self._require(name, at_least=0, at_most=1)
        if self.min_learning_rate > self.learning_rate:
            raise UserError(
                f"training.min_learning_rate={self.min_learning_rate} is above training.learning_rate="
                f"{self.learning_rate}, from which it decays; lower it"
            )
        if isinstance(self.gradient_checkpointing, bool):  # the reference's spelling
            object.__setattr__(self, "gradient_checkpointing", "block" if self.gradient_checkpointing else "none")
        self._check_effective_batch_size()
        self._check_memory()
        self._check_cuda_graph()
        self._check_lora()

    def _require(
        self,
        name: str,
        *,
        at_least: float = -math.inf,
        above: float = -math.inf,
        at_most: float = math.inf,
        below: float = math.inf,
    ) -> None:
        """Raise UserError unless the field is null or at_least <= value <= at_most and above < value < below."""
        value = getattr(self, name)
        if value is None or (at_least <= value <= at_most and above < value < below):
            return
        bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
        wanted = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound))
        raise UserError(f"training.{name} must be {wanted}, got {value}")

    def _check_effective_batch_size(self) -> None:
        """The two numbers that restate the others must agree with them; how many processes there are shows later."""
        processes = self.num_gpus or 1
        actual = self.batch_size * self.gradient_accumulation_steps * processes
        more = self.num_gpus is None and (self.effective_batch_size or 0) % actual == 0
        if self.effective_batch_size not in (None, actual) and not more:
            raise UserError(
                f"training.effective_batch_size is {self.effective_batch_size}, but batch_size {self.batch_size} x "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} x num_gpus {processes} is {actual}; "
                "correct one of them or leave effective_batch_size out"
            )

    def _check_memory(self) -> None:
        """What saves memory must be able to do so together."""
        if self.weights_dtype == "bf16" and self.mixed_precision != "bf16":
            raise UserError(
                "training.weights_dtype=bf16 computes in bfloat16; set training.mixed_precision=bf16 too, not "
                f"{self.mixed_precision}"
            )
        if self.optimizer == "muon":
            for name, only in (
                ("weights_dtype", "fp32"),
                ("optimizer_states", "fp32"),
                ("optimizer_in_backward", False),
            ):
                if getattr(self, name) != only:
                    raise UserError(
                        f"training.{name}={getattr(self, name)} is for AdamW; set training.optimizer=adamw, or leave "
                        f"{name} out"
                    )
        if not self.optimizer_in_backward:
            return
        if self.gradient_accumulation_steps > 1:
            raise UserError(
                "training.optimizer_in_backward has no gradients to add up; set "
                f"training.gradient_accumulation_steps=1, not {self.gradient_accumulation_steps}, or leave it out"
            )
        if self.mixed_precision == "fp16":
            raise UserError(
                "training.optimizer_in_backward cannot scale losses as fp16 needs it; set training.mixed_precision=bf16"
            )
        if (self.num_gpus or 1) > 1:
            raise UserError(
                "training.optimizer_in_backward moves weights before processes could exchange gradients; leave it out, "
                f"or set training.num_gpus=1, not {self.num_gpus}"
            )

    def _check_cuda_graph(self) -> None:
        """What is replayed is one UNet's kernels, whose gradients lie where the next replay writes."""
        if not self.cuda_graph:
            return
        for name, only in (
            ("task", "unet"),
            ("gradient_accumulation_steps", 1),
            ("gradient_checkpointing", "none"),
            ("optimizer_in_backward", False),
            ("compile", False),
            ("lora_rank", None),
        ):
            if getattr(self, name) != only:
                raise UserError(
                    f"training.cuda_graph needs training.{name}={'null' if only is None else str(only).lower()}, not "
                    f"{getattr(self, name)}; set it so, or leave cuda_graph out"
                )

    def _check_lora(self) -> None:
        """A LoRA is of something, and what is said of one is said where there is one."""
        if self.lora_rank is None and self.lora_alpha is not None:
            raise UserError("training.lora_alpha is the strength of a LoRA; set training.lora_rank too, or neither")
        if self.lora_rank is None:
            return
        if self.task != "unet":
            raise UserError(
                f"training.lora_rank is of the UNet, and training.task is {self.task}; leave one of them out"
            )
        if self.init_from is None:
            raise UserError(
                "training.lora_rank trains a change of a model, and a random one is none; set training.init_from"
            )


def autocast(mixed_precision: str, device: torch.device) -> torch.autocast:
    """The context in which a run of this precision computes; of "no" one that changes nothing."""
    dtype = AUTOCAST[mixed_precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
