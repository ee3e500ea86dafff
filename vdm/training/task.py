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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm import dist
from vdm.components import Components, build_text_encoder, build_unet, build_vae, with_sources
from vdm.config import Config
from vdm.data.cache import Cache
from vdm.data.dataset import ClipDataset
from vdm.data.latents import CachedLatents, KeptLatents
from vdm.data.loader import Batch
from vdm.data.video import to_float
from vdm.diffusion import NoiseSchedule, ddpm_loss, related_noise
from vdm.errors import UserError
from vdm.metrics.temporal import motion_energy
from vdm.models.vae import LatentDistribution, VideoVAE
from vdm.models.video_tower import ContrastiveHead
from vdm.pipeline import TextToVideo
from vdm.training.cached import open_cache, reads_text
from vdm.training.diagnostics import by_timestep, judge
from vdm.training.draws import HELD_OUT, NOISE, POSTERIOR, clip_generator
from vdm.training.groups import choose_what_learns
from vdm.training.preview import write_preview

Split = Literal["train", "validation"]


class Task(ABC):
    """One kind of training, on the parts of one model."""

    def __init__(self, config: Config, device: torch.device):
        self.config = config
        self.device = device
        self.modules = self.build()
        for module in self.modules.values():
            module.to(device).eval().requires_grad_(False)
        choose_what_learns(self.trained(), config.training)

    @abstractmethod
    def build(self) -> dict[str, nn.Module]:
        """Make all parts with weights, under their names in a checkpoint."""

    @abstractmethod
    def trained(self) -> dict[str, nn.Module]:
        """Those of `modules` that learn."""

    def whole(self) -> dict[str, nn.Module]:
        """All parts of the model, those too that training does without; the latter made for the moment, on the CPU."""
        return self.modules

    def came_from(self, path: Path) -> None:
        """Parts that training does without are henceforth made from the checkpoint `path`."""
        self.config = with_sources(self.config, path)

    def dataset(self, split: Split) -> ClipDataset:
        """The stream of clips of a split; a batch is all clips of one optimizer step."""
        return ClipDataset(self.config.data, **self._stream(split))

    def _stream(self, split: Split) -> dict[str, Any]:
        training = self.config.training
        global_batch = training.batch_size * training.gradient_accumulation_steps * dist.size()
        return {"split": split, "seed": self.config.seed, "batch_size": global_batch}

    @abstractmethod
    def losses(self, batch: Batch, *, training: bool) -> dict[str, Tensor]:
        """Scalar losses of a batch; the one called `loss` is minimised, the others are logged."""

    def judge(self, batch: Batch, *, others: Sequence[str]) -> dict[str, Tensor]:
        """Numbers of held-out clips, one a clip (N,); `others` are captions of other clips, by position, or nothing."""
        return {name: value.expand(len(batch.ids)) for name, value in self.losses(batch, training=False).items()}

    @abstractmethod
    def shown(self, batch: Batch) -> tuple[Tensor, Sequence[str], float]:
        """What the model does now with validation clips: clips (B,3,T,H,W) in [-1,1], captions, frames per second."""

    def preview(self, folder: Path, batch: Batch) -> dict[str, float]:
        """Write what is `shown` as clips and a contact sheet; returns numbers of the clips, to be logged."""
        video, captions, fps = self.shown(batch)
        write_preview(folder, video, captions=captions, fps=fps)
        return self.measured(video, batch)

    def measured(self, video: Tensor, batch: Batch) -> dict[str, float]:
        """Numbers of what was shown."""
        return {}


class LatentTask(Task):
    """A task on the latents of captioned clips, which a frozen VAE makes: live, or once where they are kept in memory.

    From a cache on disk it reads them, and there is no VAE, nor a frozen text tower, but for previews and checkpoints.
    """

    def __init__(self, config: Config, device: torch.device, *, cache: Cache | None = None):
        self.cache = cache or open_cache(config)
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

    def _latents(self, batch: Batch, *, seed: int | None = None) -> Tensor:
        seed = self.config.seed if seed is None else seed
        generators = [clip_generator(seed, p, POSTERIOR) for p in batch.positions]
        return self._posterior(batch).sample(generators)


class UNetTask(LatentTask):
    """Denoise the latents of captioned clips, the text tower learning along where it may."""

    data_motion: float | None = None  # of held-out clips, once it is known

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
        names = ("unet",) if reads_text(self.config) else ("unet", "text")
        return {name: self.modules[name] for name in names}

    def _contexts(self, captions: Sequence[str]) -> Tensor:
        if self.cache is not None and "text" not in self.modules:
            return self.cache.contexts(captions).to(self.device).float()
        contexts: Tensor = self.modules["text"](captions)
        return contexts

    def losses(self, batch: Batch, *, training: bool) -> dict[str, Tensor]:
        """The diffusion loss at a random time step, and what `by_timestep` says; in validation `judge`'s loss."""
        if not training:
            return {"loss": self.judge(batch, others=())["loss"].mean()}
        x0 = self._latents(batch)
        num_steps = self.schedule.config.num_train_timesteps
        recipe = self.config.training
        relations = {"correlation": recipe.frame_noise_correlation, "offset": recipe.offset_noise}
        noise, times, captions = [], [], []
        for position, caption in zip(batch.positions, batch.captions, strict=True):
            draw = clip_generator(self.config.seed, position, NOISE)
            times.append(int(torch.randint(num_steps, (), generator=draw)))
            dropped = float(torch.rand((), generator=draw)) < recipe.caption_dropout
            captions.append("" if dropped else caption)
            noise.append(related_noise(torch.randn(x0.shape[1:], generator=draw), draw, **relations))
        context = self._contexts(captions)
        loss = ddpm_loss(
            lambda x, t: self.modules["unet"](x, t, context),
            x0,
            noise=torch.stack(noise).to(self.device),
            t=torch.tensor(times, device=self.device),
            schedule=self.schedule,
        )
        return {"loss": loss.mean(), **by_timestep(loss.detach(), times, num_steps=num_steps)}

    def judge(self, batch: Batch, *, others: Sequence[str]) -> dict[str, Tensor]:
        """Losses and, where there are `others`, gains: see `diagnostics.judge`. All captions are kept."""
        wrong = [others[p] for p in batch.positions] if others else []
        return judge(
            self.modules["unet"],
            self._latents(batch, seed=HELD_OUT),
            positions=batch.positions,
            schedule=self.schedule,
            context=self._contexts(batch.captions),
            other_context=self._contexts(wrong) if wrong else None,
            differs=[other != right for other, right in zip(wrong, batch.captions, strict=False)],
        )

    def shown(self, batch: Batch) -> tuple[Tensor, Sequence[str], float]:
        """Clips for the configured prompts, or the captions of `batch`; clip i always starts from the same noise."""
        prompts = list(self.config.training.preview_prompts) or batch.captions
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        video = TextToVideo(self.config, self.parts)(prompts, generator=generators, output_type="pt").frames
        return video.transpose(1, 2) * 2.0 - 1.0, prompts, self.config.sampling.sampling_fps

    def measured(self, video: Tensor, batch: Batch) -> dict[str, float]:
        """How much the clips shown move, and how much those of `batch` do, both as the VAE decodes them."""
        if self.data_motion is None:  # of clips that are the same at every preview
            self.data_motion = _motion_as_decoded(self.part("vae"), self._posterior(batch).mode())
        ours, theirs = float(motion_energy(video).mean()), self.data_motion
        return {"preview_motion": ours, "data_motion": theirs} | ({"motion_ratio": ours / theirs} if theirs else {})


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
    def shown(self, batch: Batch) -> tuple[Tensor, Sequence[str], float]:
        """Every clip under the caption of the batch that fits it best."""
        latents = self._posterior(batch).mode()
        best = self.head(latents, self.text_encoder.pooled_and_context(batch.captions)[0]).argmax(dim=1)
        captions = [batch.captions[i] for i in best.tolist()]
        return self.part("vae").decode(latents), captions, self.config.data.fps


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
    def shown(self, batch: Batch) -> tuple[Tensor, Sequence[str], float]:
        """Every validation clip above its reconstruction."""
        video = _pixels(batch, self.device)
        decoded = self.vae.decode(self.vae.encode(video).mode())
        pairs = torch.stack([video, decoded], dim=1).flatten(0, 1)
        names = [name for caption in batch.captions for name in (caption, "reconstructed")]
        return pairs, names, self.config.data.fps


def _pixels(batch: Batch, device: torch.device) -> Tensor:
    """The clips of a batch, float32 (B,3,T,H,W) in [-1,1]; as bytes they travel to a GPU in a quarter of the time."""
    return to_float(batch.video.to(device, non_blocking=True))


@torch.no_grad()
def _motion_as_decoded(vae: VideoVAE, latents: Tensor) -> float:
    """How much clips move as the VAE shows them, as it does previews; one clip at a time, to save memory."""
    return float(torch.cat([motion_energy(vae.decode(one[None])) for one in latents]).mean())


def random_parts(config: Config) -> list[str]:
    """The keys that name no weights for parts which a new run would never train."""
    frozen: dict[str, str | None] = {}
    if config.training.task != "vae":
        frozen["vae.vae_weights"] = config.vae.vae_weights
    if reads_text(config):
        frozen["text.text_weights"] = config.text.text_weights
    return [key for key, weights in frozen.items() if weights is None]


def warn_of_random_parts(config: Config) -> None:
    """Name them."""
    for key in random_parts(config):
        print(f"warning: {key} is null, so this run trains on a random, frozen network", file=sys.stderr)


TASKS: Mapping[str, type[Task]] = {"unet": UNetTask, "vae": VAETask, "text": TextTask}


def build_task(config: Config, device: torch.device, *, cache: Cache | None = None) -> Task:
    """The task that `training.task` names, with `cache` in place of the one in `data.cache_dir`, where it is given.

    Raises `UserError` where the device cannot do the precision asked for.
    """
    if config.training.mixed_precision == "fp16" and device.type != "cuda":
        raise UserError("training.mixed_precision=fp16 needs a CUDA device; use bf16 or no on this machine")
    kind = TASKS[config.training.task]
    return kind(config, device) if cache is None else kind(config, device, cache=cache)  # type: ignore[call-arg]
