"""`vdm data cache`: every clip and caption of a run encoded once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vdm.checkpoint import RunLock
from vdm.components import build_text_encoder, build_vae
from vdm.config import Config
from vdm.data.cache import SPLITS, Cache, Entry, Plan, Split, look_name
from vdm.data.latents import Looks, digest, read_looks
from vdm.data.pool import Lost, Slow, run_each
from vdm.data.quarantine import BadClips
from vdm.data.transforms import Frames, flip
from vdm.data.video import to_float, to_video
from vdm.errors import UserError
from vdm.files import in_words
from vdm.models import VideoVAE
from vdm.text.encoder import TextEncoder
from vdm.training.cached import cache_key, reads_text, streams
from vdm.training.settings import autocast
from vdm.weights import SUFFIX

SHARD_BYTES, MOST_CLIPS = 128 << 20, 256  # of a shard, at most: what is lost when it is killed
TEXTS_AT_ONCE = 64
PIXELS_AT_ONCE = 2**21  # of frames that wait to be encoded, on a GPU together: many small clips, or one large one


def write_cache(config: Config, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
    """Make the cache that `config` describes in `folder`, or go on with it. Raises UserError."""
    if config.training.task == "vae":
        raise UserError("training.task=vae learns from pixels, of which a cache has none; leave the cache out")
    vae = build_vae(config).to(device).eval()
    text = build_text_encoder(config).to(device).eval() if reads_text(config) else None
    key = cache_key(config, vae, text)
    writer = Writer(config, folder, vae, text, key, dtype, device)
    if Cache.is_whole(folder, key, writer.plan):
        print(f"{folder} is whole already")
        return
    with RunLock(folder, what="cache", remedy="choose another data.cache_dir"):
        writer.weigh(folder)
        writer.run(Cache.start(folder, key, writer.plan))


class Writer:
    """A cache that is being made."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        vae: VideoVAE,
        text: TextEncoder | None,
        key: Mapping[str, object],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.vae, self.text, self.key, self.dtype, self.device = config, vae, text, key, dtype, device
        self.clips = streams(config)
        self.bad = {split: BadClips(clips) for split, clips in self.clips.items()}
        self.texts = self._all_texts()
        self.plan = self._plan()

    # --- before it starts

    def _all_texts(self) -> list[str]:
        """All that can be said of the clips, where that is to be kept."""
        if self.text is None:
            return []
        every = (clips.wordings(clips.source.words(i))[0] for clips in self.clips.values() for i in range(len(clips)))
        return sorted({""}.union(*every))

    def _plan(self) -> Plan:
        num_crops, mirrors = self.config.data.cache_crops, 2 if self.config.data.horizontal_flip else 1
        num_clips = max(1, min(MOST_CLIPS, SHARD_BYTES // (num_crops * mirrors * self._look_bytes)))
        return Plan(
            num_clips={split: len(clips) for split, clips in self.clips.items()},
            num_texts=len(self.texts),
            per_shard={"train": num_clips, "validation": num_clips, "text": max(1, SHARD_BYTES // self._text_bytes)},
            missing={split: clips.missing for split, clips in self.clips.items()},
            ids=digest(self.clips),
            dtype=str(self.dtype).removeprefix("torch."),
        )

    @property
    def _look_bytes(self) -> int:
        data, vae = self.config.data, self.config.vae
        height, width = data.height // vae.factor, data.width // vae.factor
        return 2 * vae.latent_channels * data.max_frames * height * width * self.dtype.itemsize

    @property
    def _text_bytes(self) -> int:
        return self.config.text.context_length * self.config.text.text_width * self.dtype.itemsize

    def weigh(self, folder: Path) -> None:
        """Say how much of the disk it takes. Raises UserError where that is more than there is."""
        plan = self.plan
        looks = self.config.data.cache_crops * (2 if self.config.data.horizontal_flip else 1)
        clips = (plan.num_clips["train"] * looks + plan.num_clips["validation"]) * self._look_bytes
        texts = plan.num_texts * self._text_bytes
        there = sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}"))
        free = shutil.disk_usage(folder).free
        print(
            f"cache {folder}: {plan.num_clips['train']} clips in up to {looks} looks, {plan.num_clips['validation']} "
            f"to validate, {_size(self._look_bytes)} a look, {_size(clips)}; {plan.num_texts} texts, {_size(texts)}; "
            f"at most {_size(clips + texts)} in all, of which {_size(there)} are there; {_size(free)} are free"
        )
        if clips + texts - there > free:
            raise UserError(f"{folder} has too little room for the cache; free some, or set data.cache_dir elsewhere")

    # --- making it

    def run(self, cache: Cache) -> None:
        """Write the shards that are not there yet."""
        self.cache = cache
        for split in SPLITS:
            to_do = self.cache.to_do(split)
            spans = [self.cache.plan.span(split, number) for number in to_do]
            total = len(self.clips[split])
            for number in range(self.cache.plan.num_shards(split)):
                if number not in to_do:
                    self._note(split, self.cache.shard_entries(split, number))
            with tqdm(total=total, initial=total - sum(map(len, spans)), desc=f"{split} clips", unit="clip") as bar:
                for number in to_do:
                    self._write_clips(split, number, bar)
        for number in sorted(set(range(cache.plan.num_shards("text"))) - set(cache.to_do("text"))):
            cache.shard_captions(number)  # a damaged one is better named now than in training
        for number in tqdm(self.cache.to_do("text"), desc="texts", unit="shard", disable=self.text is None):
            texts = [self.texts[i] for i in self.cache.plan.span("text", number)]
            contexts = torch.cat(
                [self._contexts(texts[i : i + TEXTS_AT_ONCE]) for i in range(0, len(texts), TEXTS_AT_ONCE)]
            )
            with self._on_disk():
                self.cache.write_texts(number, texts, contexts)
        self.cache.finish(self.key)

    def _write_clips(self, split: Split, number: int, bar: tqdm[Any]) -> None:
        span = self.cache.plan.span(split, number)
        entries: dict[int, Entry] = {}
        waiting: dict[str, Frames] = {}
        latents: dict[str, Tensor] = {}
        for index, looks in self._read(split, span):
            entries[index] = looks.entry
            mirrors = self.clips[split].wordings(looks.entry.words)[1]
            for crop, frames in enumerate(looks.frames):
                waiting[look_name(index, crop, False)] = frames
                if mirrors:
                    waiting[look_name(index, crop, True)] = mirrored = frames.copy()
                    flip(mirrored)
            if sum(frames[..., 0].size for frames in waiting.values()) >= PIXELS_AT_ONCE:
                latents |= self._moments(waiting)
                waiting = {}
            bar.update()
        latents |= self._moments(waiting)
        in_order = [entries[index] for index in span]
        self._note(split, in_order)
        with self._on_disk():
            self.cache.write_clips(split, number, in_order, latents)

    def _read(self, split: Split, span: range) -> Iterator[tuple[int, Looks]]:
        """The clips of a span as they are decoded, by workers where the config has some."""
        data, clips = self.config.data, self.clips[split]
        read = partial(read_looks, clips, num_crops=data.cache_crops if split == "train" else 1)
        if not data.dataloader_num_workers:
            yield from ((index, read(index)) for index in span)
            return
        workers: dict[str, Any] = {"num_workers": data.dataloader_num_workers, "time_limit": data.decode_timeout}
        died: list[int] = []
        for place, looks in run_each(read, span, **workers):
            if isinstance(looks, Lost) and not isinstance(looks, Slow):
                died.append(span[place])  # it may have been for want of memory, and what is kept is kept for good
            else:
                yield span[place], self._known(split, span[place], looks)
        for place, looks in run_each(read, died, **workers) if died else ():
            yield died[place], self._known(split, died[place], looks)

    def _known(self, split: Split, index: int, looks: Looks | Lost) -> Looks:
        """Without frames where they were lost."""
        if isinstance(looks, Looks):
            return looks
        source = self.clips[split].source
        return Looks(Entry(source.id(index), source.words(index), problem=str(looks)), [])

    def _note(self, split: Split, entries: Sequence[Entry]) -> None:
        self.bad[split].note([(entry.id, entry.problem) for entry in entries if entry.problem])

    def at_once(self, pixels: int) -> int:
        """How many looks of so many pixels are encoded at a time."""
        return 1 if self.device.type == "cpu" else max(1, PIXELS_AT_ONCE // pixels)

    @torch.no_grad()
    def _moments(self, looks: Mapping[str, Frames]) -> dict[str, Tensor]:
        """Of looks of one size, by name: some together on a GPU, one by one on a CPU, which gains nothing by more."""
        names, found = list(looks), dict[str, Tensor]()
        at_once = self.at_once(max((frames[..., 0].size for frames in looks.values()), default=1))
        for some in (names[i : i + at_once] for i in range(0, len(names), at_once)):
            video = to_float(torch.stack([to_video(looks[name]) for name in some]).to(self.device))
            with self._autocast():
                moments = self.vae.encode(video).moments.to(self.dtype).cpu()
            found |= {name: one.clone() for name, one in zip(some, moments, strict=True)}
        return found

    @torch.no_grad()
    def _contexts(self, texts: Sequence[str]) -> Tensor:
        assert self.text is not None, "else there are no texts"
        with self._autocast():
            return self.text(texts).to(self.dtype).cpu()

    def _autocast(self) -> torch.autocast:
        """The precision in which training would encode."""
        return autocast(self.config.training.mixed_precision, self.device)

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.cache.folder} cannot be written ({in_words(error)}); mend that, and the same command goes on"
            ) from error


def _size(count: int) -> str:
    unit, name = next(
        (unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= unit or name == "kB"
    )
    return f"{count / unit:.1f} {name}"
