"""What a run learns: the loss of a batch, and how to look at the result. Here data, text, models and diffusion meet.

A task is what the loop needs and no more: the parts it trains, the clips it trains on, a loss, a preview. Every random
draw of a clip is a function of (seed, position in the global stream), so it depends on neither batch nor restart.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm.components import Components, build_text_encoder, build_unet, build_vae, load_part, save_parts, with_sources
from vdm.config import Config
from vdm.data.dataset import ClipDataset
from vdm.data.latents import CachedLatents, KeptLatents
from vdm.data.loader import Batch
from vdm.data.sheet import contact_sheet
from vdm.data.video import to_float, to_uint8, write_video
from vdm.diffusion import NoiseSchedule, ddpm_loss
from vdm.errors import UserError
from vdm.models.vae import LatentDistribution
from vdm.models.video_tower import ContrastiveHead
from vdm.pipeline import TextToVideo
from vdm.training.cached import open_cache, reads_text

Split = Literal["train", "validation"]
NOISE, POSTERIOR = range(2)  # what a clip's random stream is for; the last word of its seed


def clip_generator(seed: int, position: int, purpose: int) -> torch.Generator:
    """The random stream of one clip for one purpose, on the CPU."""
    state = np.random.SeedSequence([seed, position, purpose]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


class Task(ABC):
    """One kind of training, on the parts of one model."""

    def __init__(self, config: Config, device: torch.device):
        self.config = config
        self.device = device
        self.modules = self.build()
        for module in self.modules.values():
            module.to(device).eval().requires_grad_(False)
        for module in self.trained().values():
            module.requires_grad_(True)

    @abstractmethod
    def build(self) -> dict[str, nn.Module]:
        """Make all parts with weights, under their names in a checkpoint."""

    @abstractmethod
    def trained(self) -> dict[str, nn.Module]:
        """Those of `modules` that learn."""

    def whole(self) -> dict[str, nn.Module]:
        """All parts of the model, those too that training does without; the latter made for the moment, on the CPU."""
        return self.modules

    def saved(self) -> dict[str, nn.Module]:
        """Those of `modules` that a checkpoint holds; all others are made anew from the config."""
        return self.modules

    def differentiated(self) -> dict[str, nn.Module]:
        """Those of `modules` that gradients pass through."""
        return self.trained()

    def identity(self) -> dict[str, object]:
        """What a run must have in common with a checkpoint to go on from it, besides its config: JSON by name."""
        return {}

    def notes(self) -> dict[str, str]:
        """Text files that stand in every checkpoint."""
        return {}

    def start_from(self, path: Path) -> None:
        """Fill the parts that learn from the model folder `path`."""
        for part, module in self.trained().items():
            load_part(module, path, part)

    def write_final(self, path: Path, info: Mapping[str, object]) -> None:
        """Write the finished model as it is now."""
        save_parts(path, self.config, self.whole(), info=info)

    def came_from(self, path: Path) -> None:
        """Parts that training does without are henceforth made from the checkpoint `path`."""
        self.config = with_sources(self.config, path)

    def dataset(self, split: Split) -> ClipDataset:
        """The stream of clips of a split; a batch is all clips of one optimizer step."""
        return ClipDataset(self.config.data, **self._stream(split))

    def _stream(self, split: Split) -> dict[str, Any]:
        training = self.config.training
        global_batch = training.batch_size * training.gradient_accumulation_steps
        return {"split": split, "seed": self.config.seed, "batch_size": global_batch}

    @abstractmethod
    def losses(self, batch: Batch, *, training: bool) -> dict[str, Tensor]:
        """Scalar losses of a batch; the one called `loss` is minimised, the others are logged."""

    @abstractmethod
    def preview(self, folder: Path, batch: Batch) -> None:
        """Write what the model does now as clips and a contact sheet; `batch` holds validation clips."""


class LatentTask(Task):
    """A task on the latents of captioned clips, which a frozen VAE makes: live, or once where they are kept in memory.

    From a cache on disk it reads them, and there is no VAE, nor a frozen text tower, but for previews and checkpoints.
    """

    def __init__(self, config: Config, device: torch.device):
        self.cache = open_cache(config)
        super().__init__(config, device)

    def whole(self) -> dict[str, nn.Module]:
        return {**{part: build(self.config) for part, build in self._absent().items()}, **self.modules}

    def _absent(self) -> dict[str, Callable[[Config], nn.Module]]:
        """What makes the parts of a model that are not in `modules`."""
        makers: dict[str, Callable[[Config], nn.Module]] = {"vae": build_vae, "text": build_text_encoder}
        return {part: build for part, build in makers.items() if part not in self.modules}

    def part(self, name: str) -> Any:
        """A part of the model on the device; one that training does without is made for the moment."""
        if name in self.modules:
            return self.modules[name]
        return self._absent()[name](self.config).to(self.device).eval().requires_grad_(False)

    def dataset(self, split: Split) -> ClipDataset:
        if self.cache is not None:
            return CachedLatents(self.config.data, **self._stream(split), cache=self.cache)
        if not self.config.data.cache_latents:
            return super().dataset(split)
        encode = lambda clip: self._moments(clip[None].to(self.device))[0].cpu()  # noqa: E731
        return KeptLatents(self.config.data, **self._stream(split), encode=encode)

    @torch.no_grad()
    def _moments(self, video: Tensor) -> Tensor:
        return self.part("vae").encode(video).moments

    def _posterior(self, batch: Batch) -> LatentDistribution:
        kept = self.cache is not None or self.config.data.cache_latents
        moments = batch.video.to(self.device).float() if kept else self._moments(_pixels(batch, self.device))
        return LatentDistribution(moments, self.config.vae.scaling_factor)

    def _latents(self, batch: Batch) -> Tensor:
        generators = [clip_generator(self.config.seed, p, POSTERIOR) for p in batch.positions]
        return self._posterior(batch).sample(generators)


class UNetTask(LatentTask):
    """Denoise the latents of captioned clips, the text tower learning along where it may."""

    def build(self) -> dict[str, nn.Module]:
        self.schedule = NoiseSchedule(self.config.diffusion).to(self.device)
        modules: dict[str, nn.Module] = {"unet": build_unet(self.config)}
        if self.cache is None:
            modules["vae"] = build_vae(self.config)
        if self.cache is None or not reads_text(self.config):
            modules["text"] = build_text_encoder(self.config)
        return modules

    @property
    def parts(self) -> Components:
        """The whole model on the device."""
        return Components(self.part("unet"), self.part("vae"), self.part("text"), self.schedule)

    def trained(self) -> dict[str, nn.Module]:
        names = ("unet", "text") if self.config.text.text_trainable else ("unet",)
        return {name: self.modules[name] for name in names}

    def _contexts(self, captions: Sequence[str]) -> Tensor:
        if self.cache is not None and "text" not in self.modules:
            return self.cache.contexts(captions).to(self.device).float()
        contexts: Tensor = self.modules["text"](captions)
        return contexts

    def losses(self, batch: Batch, *, training: bool) -> dict[str, Tensor]:
        """The diffusion loss; in validation the captions are all kept, and draws come from a stream of their own."""
        x0 = self._latents(batch)
        seed = self.config.seed + (0 if training else 1)
        num_steps = self.schedule.config.num_train_timesteps
        noise, times, captions = [], [], []
        for position, caption in zip(batch.positions, batch.captions, strict=True):
            draw = clip_generator(seed, position, NOISE)
            times.append(int(torch.randint(num_steps, (), generator=draw)))
            dropped = float(torch.rand((), generator=draw)) < self.config.training.caption_dropout
            captions.append("" if training and dropped else caption)
            noise.append(torch.randn(x0.shape[1:], generator=draw))
        context = self._contexts(captions)
        loss = ddpm_loss(
            lambda x, t: self.modules["unet"](x, t, context),
            x0,
            noise=torch.stack(noise).to(self.device),
            t=torch.tensor(times, device=self.device),
            schedule=self.schedule,
        )
        return {"loss": loss.mean()}

    def preview(self, folder: Path, batch: Batch) -> None:
        """Clips for the configured prompts, or the captions of `batch`; clip i always starts from the same noise."""
        prompts = list(self.config.training.preview_prompts) or batch.captions
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        video = TextToVideo(self.config, self.parts)(prompts, generator=generators, output_type="pt").frames
        _write_preview(folder, video.transpose(1, 2) * 2.0 - 1.0, prompts, self.config.sampling.sampling_fps)


class TextTask(LatentTask):
    """Pretrain the text tower to tell which caption of a batch belongs to which clip (CLIP, arXiv 2103.00020).

    A tower that learns from denoising alone must find the order of words through the blur of a noisy clip; here that
    is the shortest way to tell two captions apart. The clips of one micro-step are each other's counterexamples, so
    gradient accumulation is no substitute for a large batch.
    """

    def build(self) -> dict[str, nn.Module]:
        if self.config.training.batch_size < 2:
            raise UserError("training.task=text compares the clips of a batch; set training.batch_size to 2 or more")
        self.text_encoder = build_text_encoder(self.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.head = ContrastiveHead(self.config.vae.latent_channels, self.config.text.text_width)
        vae = {"vae": build_vae(self.config)} if self.cache is None else {}
        return {**vae, "text": self.text_encoder, "contrast": self.head}

    def trained(self) -> dict[str, nn.Module]:
        return {"text": self.text_encoder, "contrast": self.head}

    def losses(self, batch: Batch, *, training: bool) -> dict[str, Tensor]:
        """Cross-entropy both ways; clips of one caption share it, and `retrieval` counts any of them as right."""
        latents = self._latents(batch) if training else self._posterior(batch).mode()
        logits = self.head(latents, self.text_encoder.pooled_and_context(batch.captions)[0])
        same = torch.tensor([[a == b for b in batch.captions] for a in batch.captions], device=logits.device)
        target = same / same.sum(dim=1, keepdim=True)
        return {
            "loss": (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2,
            "retrieval": same.gather(1, logits.argmax(dim=1, keepdim=True)).float().mean(),
        }

    @torch.no_grad()
    def preview(self, folder: Path, batch: Batch) -> None:
        """Every clip under the caption of the batch that fits it best."""
        latents = self._posterior(batch).mode()
        best = self.head(latents, self.text_encoder.pooled_and_context(batch.captions)[0]).argmax(dim=1)
        captions = [batch.captions[i] for i in best.tolist()]
        _write_preview(folder, self.part("vae").decode(latents), captions, self.config.data.fps)


class VAETask(Task):
    """Reconstruct frames through latents: L1 and squared error, squared error of the colour alone (a pixel less its
    grey), L1 error of the image gradients, KL to the unit Gaussian.

    Colour has a term of its own, for small bright objects hardly count among all pixels and would stay grey for long.
    """

    def build(self) -> dict[str, nn.Module]:
        if self.config.data.cache_dir is not None:
            raise UserError("training.task=vae learns from pixels, of which a cache has none; leave data.cache_dir out")
        self.vae = build_vae(self.config)
        return {"vae": self.vae}

    def trained(self) -> dict[str, nn.Module]:
        return self.modules

    def losses(self, batch: Batch, *, training: bool) -> dict[str, Tensor]:
        """In validation the mean latent is decoded; in training a draw from the posterior."""
        video = _pixels(batch, self.device)
        posterior = self.vae.encode(video)
        generators = [clip_generator(self.config.seed, p, POSTERIOR) for p in batch.positions]
        decoded = self.vae.decode(posterior.sample(generators) if training else posterior.mode())
        error = decoded.float() - video
        edges = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
        colour = error - error.mean(dim=1, keepdim=True)
        reconstruction, kl = error.abs().mean() + 4.0 * error.square().mean(), posterior.kl().mean()
        weights = self.config.training
        return {
            "loss": reconstruction
            + weights.colour_weight * colour.square().mean()
            + weights.edge_weight * edges
            + weights.kl_weight * kl,
            "reconstruction": reconstruction,
            "kl": kl,
            "psnr": 10.0 * torch.log10(4.0 / error.square().mean()),  # values span 2
            "latent_std": posterior.mean.std(),
        }

    @torch.no_grad()
    def preview(self, folder: Path, batch: Batch) -> None:
        """Every validation clip above its reconstruction."""
        video = _pixels(batch, self.device)
        decoded = self.vae.decode(self.vae.encode(video).mode())
        pairs = torch.stack([video, decoded], dim=1).flatten(0, 1)
        names = [name for caption in batch.captions for name in (caption, "reconstructed")]
        _write_preview(folder, pairs, names, self.config.data.fps)


def _pixels(batch: Batch, device: torch.device) -> Tensor:
    """The clips of a batch, float32 (B,3,T,H,W) in [-1,1]; as bytes they travel to a GPU in a quarter of the time."""
    return to_float(batch.video.to(device, non_blocking=True))


def warn_of_random_parts(config: Config) -> None:
    """Name the parts that a new run would never train and that no weights are given for."""
    frozen: dict[str, str | None] = {}
    if config.training.task != "vae":
        frozen["vae.vae_weights"] = config.vae.vae_weights
    if config.training.task == "unet" and not config.text.text_trainable:
        frozen["text.text_weights"] = config.text.text_weights
    for key, weights in frozen.items():
        if weights is None:
            print(f"warning: {key} is null, so this run trains on a random, frozen network", file=sys.stderr)


def _write_preview(folder: Path, video: Tensor, captions: Sequence[str], fps: float) -> None:
    """Clips (B,3,T,H,W) in [-1,1] as mp4 files and one contact sheet."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = [to_uint8(clip.float().cpu()) for clip in video]
    for number, clip in enumerate(clips):
        write_video(folder / f"{number:02d}.mp4", clip, fps=fps)
    contact_sheet(folder / "contact_sheet.png", clips, captions=list(captions))


TASKS: Mapping[str, type[Task]] = {"unet": UNetTask, "vae": VAETask, "text": TextTask}


def build_task(config: Config, device: torch.device) -> Task:
    """The task that `training.task` names. Raises `UserError` where the device cannot do the precision asked for."""
    if config.training.mixed_precision == "fp16" and device.type != "cuda":
        raise UserError("training.mixed_precision=fp16 needs a CUDA device; use bf16 or no on this machine")
    if config.training.lora_rank is not None:
        from vdm.training.lora import LoRATask  # which is made of what is above

        return LoRATask(config, device)
    return TASKS[config.training.task](config, device)
