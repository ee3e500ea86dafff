"""The `data` section of a config: which clips, how they are cut, and what is made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vdm.data.video import ShortPolicy
from vdm.errors import UserError

MOST_SECONDS = 1e6  # that a timer is set to


@dataclass(frozen=True)
class DataConfig:
    """Raises UserError for impossible values."""

    format: Literal["mini-something", "ssv2", "folder", "jsonl", "csv", "webdataset"] = "mini-something"
    root: str | None = None
    num_clips: int | None = None  # of the training set, at most; null is all files, or 10000 of mini-something
    subset_order: Literal["first", "random"] = "random"  # which of more files: the first listed, or by lot
    subset_seed: int = 0  # the lot; another seed, other clips
    max_clips_per_template: int | None = None  # of SSv2's templates, at most so many clips of each
    templates: tuple[str, ...] = ()  # only clips of these; empty is all
    short_clips: ShortPolicy = (
        "hold"  # what a clip too short for its window does: hold its last frame, loop, or drop out
    )
    height: int = 256
    width: int = 256
    fps: float = 8.0
    min_frames: int = 16
    max_frames: int = 16  # each global batch draws one length between the two
    image_batch_share: float = 0.0  # share of global batches of images: one frame of each clip, drawn from max_frames
    crop: Literal["random", "centre"] = "random"  # of training clips, in time and in the picture
    horizontal_flip: float = 0.0  # share of training clips that are mirrored, left and right in their captions too
    color_jitter: float = 0.0  # brightness, contrast and saturation of a training clip change by up to this share
    natural_captions: float = 0.0  # share of captions in natural words, articles and all, where a clip has a template
    template_captions: float = 0.0  # share of captions that are the bare template ("pushing something ...")
    dataloader_num_workers: int = 0
    decode_timeout: float = 120.0  # seconds that a worker may take for a clip before it is given up; 0 is for ever
    pin_memory: bool = False
    max_bad_share: float = 0.05  # the run refuses a data set with more unreadable clips than this
    cache_latents: bool = False  # every clip is encoded once, and kept in memory
    cache_dir: str | None = None  # or on disk: what `vdm data cache` wrote there, texts too
    cache_crops: int = 1  # of each clip that are kept on disk, in time and in the picture
    validation_clips: int = 64  # at most so many clips make the validation loss

    def __post_init__(self) -> None:
        for name in ("height", "width", "min_frames", "max_frames", "validation_clips", "cache_crops"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_clips", "max_clips_per_template"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise UserError(f"data.{name} must be at least 1 or null, got {count}")
        for name in ("horizontal_flip", "color_jitter", "natural_captions", "template_captions", "image_batch_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.natural_captions + self.template_captions > 1:
            raise UserError(
                "data.natural_captions and data.template_captions are shares of one whole; lower one of them"
            )
        if self.cache_crops > 1 and self.crop == "centre":
            raise UserError(f"data.cache_crops={self.cache_crops} crops of data.crop=centre are all one; leave it at 1")
        if self.max_frames < self.min_frames:
            raise UserError(f"data.max_frames={self.max_frames} is below data.min_frames={self.min_frames}; raise it")
        if not (self.fps > 0 and math.isfinite(self.fps)):
            raise UserError(f"data.fps must be above 0, got {self.fps}")
        if not 0 <= self.decode_timeout <= MOST_SECONDS:
            raise UserError(f"data.decode_timeout must be 0 to {MOST_SECONDS:g} seconds, got {self.decode_timeout}")
        if self.cache_dir == "":
            raise UserError("data.cache_dir must name a folder, or be null")
        if self.dataloader_num_workers < 0:
            raise UserError(f"data.dataloader_num_workers must be at least 0, got {self.dataloader_num_workers}")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"data.max_bad_share must be between 0 and 1, got {self.max_bad_share}")
