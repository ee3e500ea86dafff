"""What a cache of latents and text contexts depends on, and the one that a run reads in place of two networks."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from vdm.components import build_text_encoder, build_vae
from vdm.config import Config
from vdm.data.cache import SPLITS, Cache, Split
from vdm.data.dataset import ClipDataset
from vdm.data.latents import digest
from vdm.errors import UserError
from vdm.models import VideoVAE
from vdm.text.encoder import TextEncoder
from vdm.weights import Weights

# Keys of the data section that decide what is kept of a clip; and of training, what is said of it.
DATA = (
    "format", "num_clips", "subset_order", "subset_seed", "max_clips_per_template", "templates", "short_clips",
    "height", "width", "fps", "max_frames", "crop", "cache_crops", "color_jitter", "validation_clips",
)  # fmt: skip
WORDS = ("horizontal_flip", "natural_captions", "template_captions")


def reads_text(config: Config) -> bool:
    """Whether a run's text tower stays as it is, so that its contexts can be kept."""
    learns = config.text.text_trainable and config.training.text_learning_rate != 0
    return config.training.task == "unet" and not learns


def cache_key(config: Config, vae: VideoVAE, text: TextEncoder | None) -> dict[str, object]:
    """All that a cache depends on, as JSON values. Of the VAE that is the encoder; the latents are not yet scaled."""
    data = {f"data.{name}": getattr(config.data, name) for name in DATA}
    said = {f"data.{name} above 0": getattr(config.data, name) > 0 for name in WORDS}
    if config.data.format == "mini-something":
        data["seed"] = config.seed
    shape = {
        name: value for name, value in asdict(vae.config).items() if name in ("image_channels", "vae_norm_num_groups")
    }
    return json.loads(
        json.dumps(
            {
                **data,
                **said,
                "the VAE's encoder": fingerprint(vae.encoder.state_dict(), shape),
                "the text tower": None if text is None else fingerprint(text.tower.state_dict(), asdict(text.config)),
            }
        )
    )


def fingerprint(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> str:
    """SHA-256 of weights by name, as float32, and of what else decides what they do."""
    weights = Weights.of(tensors)
    told = {name: value for name, value in settings.items() if not name.endswith(("_weights", "_trainable"))}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().to(torch.float32).contiguous()
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_cache(config: Config) -> Cache | None:
    """The cache that a run is to read, if any. Raises UserError where it is not whole, or of something else."""
    if config.data.cache_dir is None:
        return None
    text = build_text_encoder(config) if reads_text(config) else None
    folder = Path(config.data.cache_dir)
    cache = Cache.open(folder, cache_key(config, build_vae(config), text))
    ids = _ids(config)
    if ids is None:
        print(
            f"note: the clips of data.root={config.data.root} are not here, so {folder} stands for them",
            file=sys.stderr,
        )
    elif ids != cache.plan.ids:
        raise UserError(
            f"cache {folder} is stale: it was made of other clips or captions than data.root={config.data.root} has; "
            "make another with vdm data cache"
        )
    return cache


def streams(config: Config) -> dict[Split, ClipDataset]:
    """The clips that a cache is made of."""
    return {split: ClipDataset(config.data, split=split, seed=config.seed, batch_size=1) for split in SPLITS}


def _ids(config: Config) -> str | None:
    """The `digest` of the clips of a run; None where they are not here, or too far away to be looked at."""
    if config.data.root is not None and "://" in config.data.root:
        return None
    try:
        return digest(streams(config))
    except UserError:
        return None
