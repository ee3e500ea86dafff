"""The stream of `ClipDataset` with latents in place of pixels: encoded when first met, or read from a cache on disk.

What is kept of a clip is its longest window, in so many crops; a shorter window is a part of it, the very part that
would be cut from the file. (A clip of mini-something, which is otherwise drawn whole in as few frames as are wanted, is
then cut as well.)
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from vdm.data.cache import Cache, Entry, Split
from vdm.data.clips import window_offset
from vdm.data.dataset import LIGHT, PLACE, ClipDataset, Sample
from vdm.data.quarantine import Bad
from vdm.data.settings import DataConfig
from vdm.data.sources import Cut, FileSource, Loaded, Source, Words
from vdm.data.transforms import Frames
from vdm.data.video import UnreadableClip, to_float, to_video
from vdm.errors import UserError

KEPT = 0  # a kept clip's seed, with its index and the number of the crop


def kept_cut(config: DataConfig, split: Literal["train", "validation"], index: int, crop: int) -> Cut:
    """Where a clip is cut that is to be kept; not a function of the run's seed, so that many runs can share it."""
    if split == "validation" or config.crop == "centre":
        return Cut(config.max_frames)
    start, x, y = np.random.default_rng([KEPT, index, crop, PLACE]).random(3)
    return Cut(config.max_frames, float(start), float(x), float(y))


class LatentDataset(ClipDataset):
    """`ClipDataset` whose samples' `video` holds moments (2C,T,h,w), as they are kept."""

    num_crops = 1

    @abstractmethod
    def entry(self, index: int) -> Entry:
        """What is known of a clip."""

    @abstractmethod
    def moments(self, index: int, crop: int, mirrored: bool) -> Tensor:
        """Of its longest window (2C,T,h,w)."""

    def attempt(self, position: int, index: int) -> Sample | Bad:
        config, entry = self.config, self.entry(index)
        if entry.problem:
            return [(entry.id, entry.problem)]
        cut = self._cut_at(position)
        num_frames = cut.num_frames
        if config.short_clips == "drop" and entry.duration < (num_frames - 1) / config.fps:
            return []
        caption, mirrors = self._said(entry.words, position)
        crop = int(np.random.default_rng([self.seed, position, PLACE]).random() * self.num_crops)
        offset = window_offset(
            entry.elapsed,
            fps=config.fps,
            num_frames=num_frames,
            longest=config.max_frames,
            start_fraction=kept_cut(config, self.split, index, crop).start,
        )
        first, count = (offset, num_frames) if cut.only is None else (offset + cut.only, 1)
        video = self.moments(index, crop, mirrors)[:, first : first + count].clone()
        return Sample(video=video, caption=caption, id=entry.id, index=index, position=position, bad=[])


class KeptLatents(LatentDataset):
    """Each clip is cut from its middle and encoded when first met, then kept in memory in half precision.

    `encode` maps a clip (3,T,H,W) in [-1,1] to moments.
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
        super().__init__(replace(config, crop="centre"), split=split, seed=seed, batch_size=batch_size)
        if config.dataloader_num_workers:
            raise UserError("data.cache_latents encodes in the main process; set data.dataloader_num_workers to 0")
        if config.horizontal_flip or config.color_jitter:
            raise UserError(
                "data.cache_latents keeps one look of each clip; set horizontal_flip and color_jitter to 0, or make a "
                "cache on disk with vdm data cache"
            )
        self.encode = encode
        self._kept: dict[int, tuple[Entry, Tensor | None]] = {}

    def entry(self, index: int) -> Entry:
        if index not in self._kept:
            looks = read_looks(self, index, num_crops=1)
            moments = self.encode(to_float(to_video(looks.frames[0]))).half() if looks.frames else None
            self._kept[index] = looks.entry, moments
        return self._kept[index][0]

    def moments(self, index: int, crop: int, mirrored: bool) -> Tensor:
        moments = self._kept[index][1]
        assert moments is not None, "of a clip without a problem"
        return moments


class CachedLatents(LatentDataset):
    """The clips of a cache on disk; their files need not be there any more."""

    def __init__(
        self,
        config: DataConfig,
        *,
        split: Literal["train", "validation"],
        seed: int,
        batch_size: int,
        cache: Cache,
    ) -> None:
        self.cache = cache
        super().__init__(config, split=split, seed=seed, batch_size=batch_size)
        self.num_crops = config.cache_crops if split == "train" else 1

    def _find(self) -> Source:
        self.missing = list(self.cache.plan.missing[self.split])
        return _CachedSource(self.cache.entries(self.split))

    @property
    def sample_bytes(self) -> int:
        good = next((i for i in range(self.num_clips) if not self.entry(i).problem), None)
        return 0 if good is None else self.moments(good, 0, False).nbytes

    def entry(self, index: int) -> Entry:
        return self.cache.entries(self.split)[index]

    def moments(self, index: int, crop: int, mirrored: bool) -> Tensor:
        return self.cache.latents(self.split, index, crop, mirrored)


@dataclass(frozen=True)
class _CachedSource:
    """What a cache says of its clips."""

    entries: list[Entry]

    def __len__(self) -> int:
        return len(self.entries)

    def id(self, index: int) -> str:
        return self.entries[index].id

    def words(self, index: int) -> Words:
        return self.entries[index].words

    def caption(self, index: int) -> str:
        return self.words(index).caption

    def num_bytes(self, index: int) -> int:
        raise AssertionError("a cache has no files")

    def load(self, index: int, cut: Cut) -> Loaded:
        raise AssertionError("a cache has no pixels")


def digest(streams: Mapping[Split, ClipDataset]) -> str:
    """SHA-256 of which clips there are in each split: their ids, and the captions and sizes of their files.

    Rendered clips have no files, and their seed says all.
    """
    told = hashlib.sha256()
    for split, clips in streams.items():
        for index in range(len(clips)):
            size = clips.source.num_bytes(index)
            about = [split, clips.source.id(index), size, clips.source.caption(index) if size else ""]
            told.update(json.dumps(about).encode())
    return told.hexdigest()


@dataclass(frozen=True)
class Looks:
    """A clip's longest window in each of its crops, and what is known of it; no frames where that is a problem."""

    entry: Entry
    frames: list[Frames]  # of each crop, uint8 (T,H,W,3)


def read_looks(dataset: ClipDataset, index: int, *, num_crops: int) -> Looks:
    """All of a clip that is to be kept, but its mirror image."""
    source, name = dataset.source, dataset.source.id(index)
    if isinstance(source, FileSource) and source.short == "drop":
        source = replace(source, short="hold")  # a shorter window may still fit, which is seen when one is asked for
    looks: list[Loaded] = []
    for crop in range(num_crops):
        try:
            loaded = source.load(index, kept_cut(dataset.config, dataset.split, index, crop))
        except UnreadableClip as error:
            problem = f"{error.path.name} cannot be read: {error.reason}"
            return Looks(Entry(name, source.words(index), problem=problem), [])
        dataset.light(loaded.frames, np.random.default_rng([KEPT, index, crop, LIGHT]))
        looks.append(loaded)
    last = looks[-1]
    return Looks(Entry(name, last.words, last.elapsed, last.duration), [look.frames for look in looks])
