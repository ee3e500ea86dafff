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
from torch import Tensor, nn

from vdm import dist
from vdm.components import (
    Components,
    build_text_encoder,
    build_unet,
    build_vae,
    load_part,
    other_noise,
    save_parts,
    with_sources,
)
from vdm.config import Config
from vdm.data.cache import Cache
from vdm.data.dataset import ClipDataset
from vdm.data.latents import CachedLatents, KeptLatents
from vdm.data.loader import Batch
from vdm.data.video import to_float
from vdm.diffusion import NoiseSchedule, ddpm_loss, related_noise
from vdm.interop import open_model
from vdm.metrics.temporal import motion_energy
from vdm.models.vae import LatentDistribution
from vdm.pipeline import TextToVideo
from vdm.training.cached import open_cache, reads_text
from vdm.training.diagnostics import by_timestep, judge
from vdm.training.draws import HELD_OUT, NOISE, POSTERIOR, clip_generator, draw_timestep
from vdm.training.faults import single
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

    def rounded(self) -> dict[str, nn.Module]:
        """Those of `modules` whose weights learn as `training.weights_dtype`."""
        return self.trained()

    def write_final(
        self, path: Path, config: Config, weights: Mapping[str, Mapping[str, Tensor]], info: Mapping[str, object]
    ) -> None:
        """Write the finished model, of which `weights` are those of `whole` and `config` is the run's."""
        save_parts(path, config, weights, info=info)

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
        moments = (
            batch.video.to(self.device, non_blocking=True).float()
            if kept
            else self._moments(pixels_of(batch, self.device))
        )
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

    def start_from(self, path: Path) -> None:
        super().start_from(path)
        if dist.is_main():
            stored = open_model(path)
            differ = other_noise(self.config, stored)
            if stored.path.is_file():  # which does not say
                differ.pop("diffusion.prediction_type", None)
            scales = self.config.vae.scaling_factor, stored.config.vae.scaling_factor
            if "vae" in stored.parts and scales[0] != scales[1]:
                differ["vae.scaling_factor"] = scales
            for key, values in differ.items():
                ours, theirs = (repr(value)[:60] for value in values)
                print(f"warning: {key} is {ours}, and {path} was trained with {theirs}", file=sys.stderr)

    def trained(self) -> dict[str, nn.Module]:
        names = ("unet",) if reads_text(self.config) else ("unet", "text")
        return {name: self.modules[name] for name in names}

    def _contexts(self, captions: Sequence[str]) -> Tensor:
        if self.cache is not None and "text" not in self.modules:
            return self.cache.contexts(captions).to(self.device, non_blocking=True).float()
        contexts: Tensor = self.modules["text"](captions)
        return contexts

    def losses(self, batch: Batch, *, training: bool) -> dict[str, Tensor]:
        """The diffusion loss at a random time step, and what `by_timestep` says; in validation `judge`'s loss."""
        if not training:
            return {"loss": self.judge(batch, others=())["loss"].mean()}
        x0 = self._latents(batch)
        num_steps = self.schedule.config.num_train_timesteps
        noise, times, captions = [], [], []
        for position, caption in zip(batch.positions, batch.captions, strict=True):
            draw = clip_generator(self.config.seed, position, NOISE)
            times.append(draw_timestep(num_steps, draw, self.config.training))
            dropped = float(torch.rand((), generator=draw)) < self.config.training.caption_dropout
            captions.append("" if dropped else caption)
            noise.append(self._relate(torch.randn(x0.shape[1:], generator=draw), draw))
        context = self._contexts(captions)
        loss = ddpm_loss(
            lambda x, t: self.modules["unet"](x, t, context),
            x0,
            noise=torch.stack(noise).to(self.device, non_blocking=True),
            t=torch.tensor(times).to(self.device, non_blocking=True),
            schedule=self.schedule,
        )
        return {"loss": loss.mean(), **by_timestep(loss.detach(), times, num_steps=num_steps)}

    def _relate(self, noise: Tensor, draw: torch.Generator) -> Tensor:
        recipe = self.config.training
        return related_noise(noise, draw, correlation=recipe.frame_noise_correlation, offset=recipe.offset_noise)

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
            relate=self._relate,
            differs=[other != right for other, right in zip(wrong, batch.captions, strict=False)],
        )

    def shown(self, batch: Batch) -> tuple[Tensor, Sequence[str], float]:
        """Clips for the configured prompts, or the captions of `batch`; clip i always starts from the same noise."""
        prompts = list(self.config.training.preview_prompts) or batch.captions
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        video = TextToVideo(self.config, self.parts)(prompts, generator=generators, output_type="pt").frames
        return video.transpose(1, 2) * 2.0 - 1.0, prompts, self.config.sampling.sampling_fps

    @torch.no_grad()
    def _motion_as_decoded(self, batch: Batch) -> float:
        """How much clips move as the VAE shows them, as it does previews; one clip at a time, to save memory."""
        vae = self.part("vae")
        clips = (single(batch, number) for number in range(len(batch.ids)))
        return float(torch.cat([motion_energy(vae.decode(self._posterior(one).mode())) for one in clips]).mean())

    def measured(self, video: Tensor, batch: Batch) -> dict[str, float]:
        """How much the clips shown move, and how much those of `batch` do, both as the VAE decodes them."""
        if self.data_motion is None:  # of clips that are the same at every preview
            self.data_motion = self._motion_as_decoded(batch)
        ours, theirs = float(motion_energy(video).mean()), self.data_motion
        return {"preview_motion": ours, "data_motion": theirs} | ({"motion_ratio": ours / theirs} if theirs else {})


def pixels_of(batch: Batch, device: torch.device) -> Tensor:
    """The clips of a batch, float32 (B,3,T,H,W) in [-1,1]; as bytes they travel to a GPU in a quarter of the time."""
    return to_float(batch.video.to(device, non_blocking=True))
