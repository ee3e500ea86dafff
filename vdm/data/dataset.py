"""Clips as an endless, numbered stream: sample `position` depends on the seed and on `position`, on nothing else.

So the stream can be entered anywhere (exact resume) and cut up among any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from vdm.data.captions import without_brackets
from vdm.data.find import find_clips
from vdm.data.mirror import mirrored
from vdm.data.phrasing import num_forms, rephrased
from vdm.data.quarantine import Bad, first_of, refuse_bad_share
from vdm.data.settings import DataConfig
from vdm.data.sources import Cut, FileSource, RenderedSource, Source, Words
from vdm.data.ssv2 import ClipFile
from vdm.data.subset import choose
from vdm.data.transforms import Frames, flip, jitter
from vdm.data.video import ShortClip, UnreadableClip, to_video
from vdm.errors import UserError

# What a random stream is for; the last word of its seed.
ORDER, LENGTH, PLACE, MIRROR, WORDING, LIGHT, IMAGES, FRAME = range(8)
VALIDATION_OFFSET = 1_000_000_000  # first index of mini-something's validation clips, beyond any training set
MAX_TRIES = 100  # neighbours tried in place of an unreadable clip


class Sample(TypedDict):
    """One clip of the stream; `bad` names the clips that this one stands in for."""

    video: Tensor  # uint8 (3,T,H,W)
    caption: str
    id: str
    index: int
    position: int
    bad: Bad


class ClipDataset(Dataset[Sample]):
    """The stream of one split, indexed by position.

    Training: epoch `position // N` visits all N clips once in its own random order, each cut at random; all clips of a
    global batch (`position // batch_size`) have one length, or are images, each one frame of a clip of the longest
    length. Validation: clip `position`, the longest length, cut from
    the middle. Files that are known to be unusable are left out and listed in `missing`, but for
    those that are not there where enough others are. Raises UserError where a data
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
        self.given_up: dict[int, str] = {}  # clips that a decoder hung on or died of, and how
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
        return FileSource(usable, config.height, config.width, config.fps, config.max_frames, config.short_clips)

    def _chosen(self, clips: list[ClipFile]) -> list[ClipFile]:
        """The subset that the config asks for. Clips that are known to be unusable do not stand in its way, as long as
        there are enough others: of the full annotations one may have a part of the videos."""
        config, train = self.config, self.split == "train"
        usable = [clip for clip in clips if not clip.problem]
        if not train and not config.templates:
            enough = len(usable) >= config.validation_clips
            return [clip for clip in clips if clip.problem != "no file"] if enough else clips
        if not config.templates and (config.num_clips, config.max_clips_per_template) == (None, None):
            return clips
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
    def sample_bytes(self) -> int:
        """Of the largest `video` that a sample holds."""
        return 3 * self.config.max_frames * self.config.height * self.config.width

    @property
    def captions(self) -> list[str]:
        """The caption of every clip, in the order of the indices; mini-something takes a millisecond for each."""
        return [self.source.caption(index) for index in range(self.num_clips)]

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, position: int) -> Sample:
        """The clip of a position, or the first after it that can be used."""
        bad: Bad = []
        for index in self.candidates(position):
            found = self.attempt(position, index)
            if not isinstance(found, list):
                found["bad"] = bad
                return found
            bad += found
        raise self.exhausted(position, bad)

    def candidates(self, position: int) -> Sequence[int]:
        """The clips to try at a position, in order: its own, then that one's neighbours."""
        if position < 0 or (self.split == "validation" and position >= self.num_clips):
            raise IndexError(f"the {self.split} stream has no position {position}")
        first = self._clip_at(position)
        return [index % self.num_clips for index in range(first, first + min(self.num_clips, MAX_TRIES))]

    def attempt(self, position: int, index: int) -> Sample | Bad:
        """Clip `index` as the sample of a position; where it cannot be, why not, or nothing if it is merely short."""
        name = self.source.id(index)
        try:
            loaded = self.source.load(index, self._cut_at(position))
        except UnreadableClip as error:
            return [(name, f"{error.path.name} cannot be read: {error.reason}")]
        except ShortClip:
            return []
        caption, mirrors = self._said(loaded.words, position)
        if mirrors:
            flip(loaded.frames)
        self.light(loaded.frames, np.random.default_rng([self.seed, position, LIGHT]))
        video = to_video(loaded.frames)
        return Sample(video=video, caption=caption, id=name, index=index, position=position, bad=[])

    def exhausted(self, position: int, bad: Bad) -> UserError:
        """What to say when no candidate of a position can be used."""
        root, tries = self.config.root, min(self.num_clips, MAX_TRIES)
        if bad:
            return UserError(f"none of {tries} clips of {root} can be read ({first_of(bad)}); mend or replace them")
        return UserError(
            f"{tries} clips of {root} in a row are too short for {self._cut_at(position).num_frames} frames at "
            f"{self.config.fps:g} fps; set data.short_clips to hold or loop"
        )

    def _said(self, words: Words, position: int) -> tuple[str, bool]:
        """What is said of a clip at a position, in other words as the config says, and whether the clip is mirrored."""
        config = self.config
        if self.split == "validation":
            return words.caption, False
        kind, form = np.random.default_rng([self.seed, position, WORDING]).random(2)
        caption = words.caption
        if words.template and kind < config.natural_captions:
            caption = rephrased(words.template, words.placeholders, form=int(form * num_forms(words.template)))
        elif words.template and kind < config.natural_captions + config.template_captions:
            caption = without_brackets(words.template).lower()
        if np.random.default_rng([self.seed, position, MIRROR]).random() >= config.horizontal_flip:
            return caption, False
        turned = mirrored(caption, template=words.template, placeholders=words.placeholders)
        return (caption, False) if turned is None else (turned, True)

    def wordings(self, words: Words) -> tuple[set[str], bool]:
        """All that can be said of a training clip under this config, and whether it can be of its mirror image."""
        config, said = self.config, {words.caption}
        if words.template and config.natural_captions:
            forms = range(num_forms(words.template))
            said |= {rephrased(words.template, words.placeholders, form=form) for form in forms}
        if words.template and config.template_captions:
            said.add(without_brackets(words.template).lower())
        if self.split == "validation" or not config.horizontal_flip:
            return said, False
        turned = {mirrored(text, template=words.template, placeholders=words.placeholders) for text in said} - {None}
        return said | {text for text in turned if text is not None}, bool(turned)

    def light(self, frames: Frames, draw: np.random.Generator) -> None:
        """Change the light of a training clip in place, as the config says."""
        strength = self.config.color_jitter
        if strength and self.split == "train":
            brightness, contrast, saturation = (1 + strength * (2 * draw.random(3) - 1)).tolist()
            jitter(frames, brightness=brightness, contrast=contrast, saturation=saturation)

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
        config, batch = self.config, position // self.batch_size
        num_frames, only = config.max_frames, None
        if np.random.default_rng([self.seed, batch, IMAGES]).random() < config.image_batch_share:
            only = int(np.random.default_rng([self.seed, position, FRAME]).integers(num_frames))
        else:
            lengths = np.random.default_rng([self.seed, batch, LENGTH])
            num_frames = int(lengths.integers(config.min_frames, config.max_frames + 1))
        if config.crop == "centre":
            return Cut(num_frames, only=only)
        start, x, y = np.random.default_rng([self.seed, position, PLACE]).random(3)
        return Cut(num_frames, float(start), float(x), float(y), only)
