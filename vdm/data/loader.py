"""Clips as an endless, numbered stream: sample `position` depends on the seed and on `position`, on nothing else.

So the stream can be entered anywhere (exact resume) and cut up among any number of workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vdm.data.captions import without_brackets
from vdm.data.find import find_clips
from vdm.data.mirror import mirrored
from vdm.data.phrasing import NUM_FORMS, rephrased
from vdm.data.quarantine import Bad, first_of, refuse_bad_share
from vdm.data.settings import DataConfig
from vdm.data.sources import Cut, FileSource, RenderedSource, Source, Words
from vdm.data.ssv2 import ClipFile
from vdm.data.subset import choose
from vdm.data.transforms import flip, jitter
from vdm.data.video import Frames, ShortClip, UnreadableClip, to_float
from vdm.errors import UserError

ORDER, LENGTH, PLACE, LOOKS, WORDING = range(5)  # what a random stream is for; the last word of its seed
VALIDATION_OFFSET = 1_000_000_000  # first index of mini-something's validation clips, beyond any training set
MAX_TRIES = 100  # neighbours tried in place of an unreadable clip


# --- the stream ---


class Sample(TypedDict):
    """One clip of the stream; `bad` names the clips that this one stands in for."""

    video: Tensor  # float32 (3,T,H,W) in [-1,1]
    caption: str
    id: str
    index: int
    position: int
    bad: Bad


class ClipDataset(Dataset[Sample]):
    """The stream of one split, indexed by position.

    Training: epoch `position // N` visits all N clips once in its own random order, each cut at random; all clips of a
    global batch (`position // batch_size`) have one length. Validation: clip `position`, the longest length, cut from
    the middle. Files that are known to be unusable are left out and listed in `missing`. Raises UserError where a data
    set cannot be used.
    """

    def __init__(
        self, config: DataConfig, *, split: Literal["train", "validation"], seed: int, batch_size: int
    ) -> None:
        self.config = config
        self.split = split
        self.seed = seed
        self.batch_size = batch_size
        self.missing: Bad = []
        self.source = self._find()
        self.num_listed = len(self.source) + len(self.missing)
        refuse_bad_share(self.missing, num_clips=self.num_listed, limit=config.max_bad_share)
        if not len(self.source):
            raise UserError(
                f"no {split} clip of {config.root} can be used ({first_of(self.missing)}); mend or replace them"
            )
        held = config.validation_clips if split == "validation" else len(self.source)
        self.num_clips = min(held, len(self.source))
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def _find(self) -> Source:
        config = self.config
        if config.format == "mini-something":
            if config.root is not None:
                raise UserError(
                    f"data.root={config.root} is set, but data.format=mini-something reads no files; "
                    "set data.format to ssv2, folder, jsonl, csv or webdataset, or leave data.root out"
                )
            train = self.split == "train"
            num_clips, first = (config.num_clips or 10000, 0) if train else (config.validation_clips, VALIDATION_OFFSET)
            if config.templates or config.max_clips_per_template is not None:
                raise UserError("data.templates and data.max_clips_per_template choose among files; leave them out")
            return RenderedSource(num_clips, first, self.seed, config.height, config.width, config.fps)
        clips = self._chosen(find_clips(config, self.split))
        self.missing = [(clip.id, clip.problem) for clip in clips if clip.problem]
        usable = [clip for clip in clips if not clip.problem]
        return FileSource(usable, config.height, config.width, config.fps, config.short_clips)

    def _chosen(self, clips: list[ClipFile]) -> list[ClipFile]:
        """The subset that the config asks for. Clips that are known to be unusable do not stand in its way, as long as
        there are enough others: of the full annotations one may have a part of the videos."""
        config, train = self.config, self.split == "train"
        if not config.templates and (not train or (config.num_clips, config.max_clips_per_template) == (None, None)):
            return clips
        usable = [clip for clip in clips if not clip.problem]
        chosen = choose(
            usable,
            num_clips=config.num_clips if train else None,
            order=config.subset_order,
            seed=config.subset_seed,
            max_per_template=config.max_clips_per_template if train else None,
            templates=config.templates,
        )
        lacking = config.num_clips is not None and len(chosen) < config.num_clips
        return chosen + [clip for clip in clips if clip.problem] if lacking else chosen

    @property
    def captions(self) -> list[str]:
        """The caption of every clip, in the order of the indices; mini-something takes a millisecond for each."""
        return [self.source.caption(index) for index in range(self.num_clips)]

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, position: int) -> Sample:
        if position < 0 or (self.split == "validation" and position >= self.num_clips):
            raise IndexError(f"the {self.split} stream has no position {position}")
        first, cut = self._clip_at(position), self._cut_at(position)
        bad: Bad = []
        for index in range(first, first + min(self.num_clips, MAX_TRIES)):
            index %= self.num_clips
            name = self.source.id(index)
            try:
                frames, words = self.source.load(index, cut)
            except UnreadableClip as error:
                bad.append((name, f"{error.path.name} cannot be read: {error.reason}"))
                continue
            except ShortClip:
                continue
            frames, caption = self._dressed(frames, words, position)
            return Sample(video=to_float(frames), caption=caption, id=name, index=index, position=position, bad=bad)
        if not bad:
            raise UserError(
                f"{min(self.num_clips, MAX_TRIES)} clips of {self.config.root} in a row are too short for "
                f"{cut.num_frames} frames at {self.config.fps:g} fps; set data.short_clips to hold or loop"
            )
        raise UserError(
            f"none of {len(bad)} clips of {self.config.root} can be read ({first_of(bad)}); mend or replace them"
        )

    def _dressed(self, frames: Frames, words: Words, position: int) -> tuple[Frames, str]:
        """A training clip in other words, mirrored, in other light, as the config says and its position draws."""
        config = self.config
        if self.split == "validation":
            return frames, words.caption
        kind, form = np.random.default_rng([self.seed, position, WORDING]).random(2)
        caption = words.caption
        if words.template and kind < config.natural_captions:
            caption = rephrased(words.template, words.placeholders, form=int(form * NUM_FORMS))
        elif words.template and kind < config.natural_captions + config.template_captions:
            caption = without_brackets(words.template).lower()
        mirror, *light = np.random.default_rng([self.seed, position, LOOKS]).random(4)
        if mirror < config.horizontal_flip:
            turned = mirrored(caption, template=words.template, placeholders=words.placeholders)
            frames, caption = (frames, caption) if turned is None else (flip(frames), turned)
        if config.color_jitter:
            factors = (float(1 + config.color_jitter * (2 * draw - 1)) for draw in light)
            frames = jitter(frames, **dict(zip(("brightness", "contrast", "saturation"), factors, strict=True)))
        return frames, caption

    def _clip_at(self, position: int) -> int:
        if self.split == "validation":
            return position
        epoch, place = divmod(position, self.num_clips)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch, ORDER]).permutation(self.num_clips)
        return int(self._order[place])

    def _cut_at(self, position: int) -> Cut:
        if self.split == "validation":
            return Cut(self.config.max_frames)
        lengths = np.random.default_rng([self.seed, position // self.batch_size, LENGTH])
        num_frames = int(lengths.integers(self.config.min_frames, self.config.max_frames + 1))
        if self.config.crop == "centre":
            return Cut(num_frames)
        start, x, y = np.random.default_rng([self.seed, position, PLACE]).random(3)
        return Cut(num_frames, float(start), float(x), float(y))


# --- batches ---


@dataclass(frozen=True)
class Batch:
    """Clips of one length, side by side."""

    video: Tensor  # float32 (B,3,T,H,W) in [-1,1]
    captions: list[str]
    ids: list[str]
    indices: list[int]
    positions: list[int]
    bad: Bad

    def pin_memory(self) -> Batch:
        return replace(self, video=self.video.pin_memory())


class _Carried(Dataset[Sample | UserError]):
    """A dataset whose UserErrors travel as values: raised in a worker, they would arrive wrapped in a traceback."""

    def __init__(self, dataset: ClipDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, position: int) -> Sample | UserError:
        try:
            return self.dataset[position]
        except UserError as error:
            return UserError(str(error))


@dataclass(frozen=True)
class _Positions:
    """Positions of consecutive batches; `stop` None never ends. The last batch may be smaller."""

    batch_size: int
    first_batch: int
    num_batches: int | None
    stop: int | None

    def __iter__(self) -> Iterator[list[int]]:
        for number in itertools.islice(itertools.count(self.first_batch), self.num_batches):
            first = number * self.batch_size
            last = first + self.batch_size if self.stop is None else min(first + self.batch_size, self.stop)
            if first >= last:
                return
            yield list(range(first, last))


def batches(
    dataset: ClipDataset,
    *,
    batch_size: int,
    start_batch: int = 0,
    num_batches: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches start_batch, start_batch + 1, ... of the stream: without end for training, one pass for validation.

    Entering at batch k gives what skipping k batches gives, with any number of workers. A training batch must not
    straddle two global ones: `batch_size` divides the dataset's. Raises UserError where a worker dies, or gives nothing
    for `data.worker_timeout` seconds.
    """
    training = dataset.split == "train"
    assert not training or dataset.batch_size % batch_size == 0, "a batch must lie inside one global batch"
    loader = DataLoader(
        _Carried(dataset),
        batch_sampler=_Positions(batch_size, start_batch, num_batches, None if training else len(dataset)),
        num_workers=num_workers,
        generator=torch.Generator(),  # else the loader draws its workers' seed from the global generator
        collate_fn=_collate,
        pin_memory=pin_memory and torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        persistent_workers=num_workers > 0,
        timeout=dataset.config.worker_timeout if num_workers else 0.0,
    )
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as error:
        told = _of_workers(error, dataset.config)
        if told is None:
            raise
        raise told from error
    finally:
        del loader  # ends the workers now; left to the garbage collector, each would be waited for in vain


def _of_workers(error: RuntimeError, config: DataConfig) -> UserError | None:
    """What torch's data loader says of its workers, in one sentence; None where it speaks of something else."""
    check = "vdm data check finds the clip, if it is one"
    if "exited unexpectedly" in str(error):
        return UserError(
            f"a data worker died ({str(error).splitlines()[0]}), killed for want of memory or by a decoder; lower "
            f"data.dataloader_num_workers={config.dataloader_num_workers}, or {check}"
        )
    if "timed out" in str(error):
        waited = f"no data worker gave a batch for data.worker_timeout={config.worker_timeout:g} seconds"
        return UserError(f"{waited}; raise it for a slow disk, and {check}")
    return None


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)  # the workers are the parallelism


def _collate(samples: list[Sample | UserError]) -> Batch | UserError:
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        good.append(sample)
    return Batch(
        video=torch.stack([sample["video"] for sample in good]),
        captions=[sample["caption"] for sample in good],
        ids=[sample["id"] for sample in good],
        indices=[sample["index"] for sample in good],
        positions=[sample["position"] for sample in good],
        bad=[pair for sample in good for pair in sample["bad"]],
    )
