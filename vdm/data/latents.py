"""Clips encoded once: the stream of `ClipDataset` with latents in place of pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from vdm.data.dataset import ClipDataset, Sample
from vdm.data.settings import DataConfig
from vdm.data.sources import Cut
from vdm.data.video import to_float
from vdm.errors import UserError


class LatentDataset(ClipDataset):
    """Each clip is cut from its middle and encoded when first met, then kept in memory in half precision.

    `encode` maps a clip (3,T,H,W) in [-1,1] to what is kept, whose second axis is time; a sample's `video` holds that.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        split: Literal["train", "validation"],
        seed: int,
        batch_size: int,
        encode: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(config, split=split, seed=seed, batch_size=batch_size)
        if config.dataloader_num_workers:
            raise UserError("data.cache_latents encodes in the main process; set data.dataloader_num_workers to 0")
        if config.horizontal_flip or config.color_jitter:
            raise UserError("data.cache_latents keeps one look of each clip; set horizontal_flip and color_jitter to 0")
        self.encode = encode
        self._kept: dict[int, Sample] = {}

    def __getitem__(self, position: int) -> Sample:
        index = self._clip_at(position)
        if index not in self._kept:
            sample = super().__getitem__(position)
            self._kept[index] = Sample(**{**sample, "video": self.encode(to_float(sample["video"])).half()})
        kept = self._kept[index]
        num_frames = super()._cut_at(position).num_frames
        return Sample(**{**kept, "video": kept["video"][:, :num_frames].float(), "position": position})

    def _cut_at(self, position: int) -> Cut:
        return Cut(self.config.max_frames)
