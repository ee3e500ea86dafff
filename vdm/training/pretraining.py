"""Training of the parts that a UNet's takes for granted: the text tower, against clips, and the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm.components import build_text_encoder, build_vae, load_part
from vdm.data.loader import Batch
from vdm.errors import UserError
from vdm.models.video_tower import ContrastiveHead
from vdm.training.draws import POSTERIOR, clip_generator
from vdm.training.task import LatentTask, Task, pixels_of


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

    def start_from(self, path: Path) -> None:
        """Fill the text tower; what it is held against is no part of a model, and begins anew."""
        load_part(self.text_encoder, path, "text")

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
        video = pixels_of(batch, self.device)
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
        video = pixels_of(batch, self.device)
        decoded = self.vae.decode(self.vae.encode(video).mode())
        pairs = torch.stack([video, decoded], dim=1).flatten(0, 1)
        names = [name for caption in batch.captions for name in (caption, "reconstructed")]
        return pairs, names, self.config.data.fps
