"""Clips encoded once: the same stream as of pixels, each clip cut from its middle."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from vdm.data.cache import Cache, Entry, Plan, look_name
from vdm.data.dataset import ClipDataset
from vdm.data.latents import CachedLatents, KeptLatents, kept_cut, read_looks
from vdm.data.loader import batches
from vdm.data.mini_something import render_clip, write_ssv2
from vdm.data.settings import DataConfig
from vdm.data.transforms import Crop, flip
from vdm.data.video import read_clip, to_float, to_video, write_video
from vdm.errors import UserError

Split = Literal["train", "validation"]
VIDEOS = "20bn-something-something-v2"
CONFIG = DataConfig(num_clips=5, height=16, width=16, min_frames=2, max_frames=4, validation_clips=3)


class Encoder:
    """Halves the picture and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, clip: Tensor) -> Tensor:
        self.calls += 1
        assert clip.dtype == torch.float32 and clip.shape == (3, 4, 16, 16)
        return clip[:, :, ::2, ::2] * 0.7


def latents(
    config: DataConfig = CONFIG,
    *,
    split: Split = "train",
    seed: int = 0,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> KeptLatents:
    return KeptLatents(config, split=split, seed=seed, batch_size=2, encode=encode or Encoder())


def clips(config: DataConfig = CONFIG, *, split: Split = "train", seed: int = 0) -> ClipDataset:
    return ClipDataset(config, split=split, seed=seed, batch_size=2)


def test_a_sample_is_the_encoded_clip() -> None:
    """mini-something cuts nothing away, so the plain stream shows the same clips."""
    kept, plain = latents(), clips(replace(CONFIG, min_frames=4))
    for position in range(12):
        ours, theirs = kept[position], plain[position]
        for key in ("caption", "id", "index", "position", "bad"):
            assert ours[key] == theirs[key]
        length = ours["video"].shape[1]
        first = (4 - length) // 2  # a shorter window lies in the middle of the longest
        expected = Encoder()(to_float(theirs["video"])).half()[:, first : first + length]
        assert torch.equal(ours["video"], expected)


def test_lengths_are_those_of_the_plain_stream() -> None:
    kept, plain = latents(), clips()
    lengths = [kept[position]["video"].shape[1] for position in range(20)]
    assert lengths == [plain[position]["video"].shape[1] for position in range(20)]
    assert set(lengths) == {2, 3, 4}


def test_files_are_cut_from_their_middle(tmp_path: Path) -> None:
    write_ssv2(tmp_path, num_clips=6, size=24, num_frames=12, fps=8.0, seed=0)
    kept = latents(replace(CONFIG, format="ssv2", root=str(tmp_path), min_frames=4))
    for position in range(5):
        sample = kept[position]
        path = tmp_path / VIDEOS / f"{sample['id']}.mp4"
        middle = to_float(to_video(read_clip(path, fps=8.0, num_frames=4, start=0.5, crop=Crop(16, 16))))
        assert torch.equal(sample["video"], Encoder()(middle).half())


def test_every_clip_is_encoded_once() -> None:
    encode = Encoder()
    kept = latents(encode=encode)
    first = [kept[position]["video"].clone() for position in range(15)]
    assert encode.calls == 5
    assert all(torch.equal(video, kept[position]["video"]) for position, video in enumerate(first))
    assert encode.calls == 5


def test_the_stream_can_be_entered_anywhere() -> None:
    whole = list(itertools.islice(batches(latents(), batch_size=2), 6))
    late = list(itertools.islice(batches(latents(), batch_size=2, start_batch=4), 2))
    for ours, theirs in zip(late, whole[4:], strict=True):
        assert torch.equal(ours.video, theirs.video)
        assert (ours.captions, ours.positions) == (theirs.captions, theirs.positions)


def test_a_sample_may_be_changed_without_harm() -> None:
    kept = latents()
    before = kept[0]["video"].clone()
    kept[0]["video"].zero_()
    assert torch.equal(kept[0]["video"], before)


def test_validation_is_one_pass_over_its_own_clips() -> None:
    found = [batch.ids for batch in batches(latents(split="validation"), batch_size=2)]
    assert found == [batch.ids for batch in batches(clips(split="validation"), batch_size=2)]
    assert sum(map(len, found)) == 3


def test_an_unreadable_clip_is_replaced_and_named(tmp_path: Path) -> None:
    write_ssv2(tmp_path, num_clips=6, size=16, num_frames=4, fps=8.0, seed=0)
    broken = min((tmp_path / VIDEOS).iterdir())
    broken.write_bytes(b"not a video")
    kept = latents(replace(CONFIG, format="ssv2", root=str(tmp_path), max_bad_share=0.5))
    samples = [kept[position] for position in range(5)]
    assert [name for sample in samples for name, _ in sample["bad"]] == [broken.stem]
    assert broken.stem not in {sample["id"] for sample in samples}


def test_workers_are_refused() -> None:
    with pytest.raises(UserError, match="set data.dataloader_num_workers to 0"):
        latents(replace(CONFIG, dataloader_num_workers=1))


def test_the_seed_orders_the_clips() -> None:
    orders = [[latents(seed=seed)[position]["index"] for position in range(5)] for seed in (0, 1, 2)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len({tuple(order) for order in orders}) > 1


# ---- on disk


def encode(frames: np.ndarray) -> Tensor:
    """Moments of which the pixels can be read."""
    return to_video(frames)[:, :, ::2, ::2].clone()


def written(config: DataConfig, folder: Path, split: Split = "train") -> Cache:
    """The cache of one split, with `encode` for a VAE."""
    source = clips(config, split=split)
    plan = Plan({split: len(source)}, 0, {split: 3}, {split: source.missing}, "", "uint8")
    cache = Cache.start(folder, {}, plan)
    for number in range(plan.num_shards(split)):
        entries, kept = [], {}
        for index in plan.span(split, number):
            looks = read_looks(source, index, num_crops=config.cache_crops if split == "train" else 1)
            entries.append(looks.entry)
            for crop, frames in enumerate(looks.frames):
                kept[look_name(index, crop, False)] = encode(frames)
                flip(frames)
                kept[look_name(index, crop, True)] = encode(frames)
        cache.write_clips(split, number, entries, kept)
    return cache


def cached(config: DataConfig, folder: Path, split: Split = "train") -> CachedLatents:
    return CachedLatents(config, split=split, seed=0, batch_size=2, cache=written(config, folder, split))


def files(root: Path, **changes: object) -> DataConfig:
    """Clips of several lengths, some shorter than the longest window; most windows have room."""
    for number, length in enumerate((3, 5, 8, 13, 20, 31, 12, 9)):
        frames = render_clip(number, seed=0, height=16, width=24, num_frames=length, fps=8).frames
        write_video(root / f"{number}.mp4", frames, fps=(8, 12, 30)[number % 3])
        (root / f"{number}.txt").write_text(f"pushing a ball from left to right {number}")
    base = {"format": "folder", "root": str(root), "num_clips": None, "max_frames": 8, "crop": "centre"}
    return replace(CONFIG, **{**base, **changes})


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("short", ["hold", "loop", "drop"])
def test_without_augmentation_a_cache_gives_what_the_files_give(tmp_path: Path, short: str, split: Split) -> None:
    """At every length, and with clips left out where they are too short."""
    config = files(tmp_path, short_clips=short, validation_clips=2)
    (tmp_path / "6.mp4").write_bytes(b"not a video")
    config = replace(config, max_bad_share=0.5)
    kept, plain = cached(config, tmp_path / "cache", split), clips(config, split=split)
    lengths = set()
    for position in range(24 if split == "train" else len(plain)):
        ours, theirs = kept[position], plain[position]
        assert torch.equal(ours["video"], theirs["video"][:, :, ::2, ::2])
        assert {**ours, "video": None} == {**theirs, "video": None}
        lengths.add(ours["video"].shape[1])
    assert split == "validation" or len(lengths) > 4


@pytest.mark.parametrize("short", ["hold", "drop"])
def test_images_are_those_of_the_files(tmp_path: Path, short: str) -> None:
    """In memory and on disk, frame for frame and caption for caption; a global batch is of images or of clips."""
    config = files(tmp_path, short_clips=short, image_batch_share=0.5)
    plain, on_disk = clips(config), cached(config, tmp_path / "cache")
    in_memory = KeptLatents(config, split="train", seed=0, batch_size=2, encode=lambda clip: clip[:, :, ::2, ::2])
    lengths = []
    for position in range(16):
        theirs = plain[position]
        small = theirs["video"][:, :, ::2, ::2]
        for ours in (on_disk[position], in_memory[position]):
            assert {**ours, "video": None} == {**theirs, "video": None}
        assert torch.equal(on_disk[position]["video"], small)
        assert torch.equal(in_memory[position]["video"], to_float(small).half())
        lengths.append(small.shape[1])
    assert lengths[::2] == lengths[1::2] and 1 in lengths and len(set(lengths)) > 1


def test_each_look_is_a_draw_of_its_own_and_all_come_up(tmp_path: Path) -> None:
    config = files(tmp_path, crop="random", cache_crops=3, horizontal_flip=0.5, color_jitter=0.3, min_frames=8)
    kept = cached(config, tmp_path / "cache")
    seen: dict[int, set[bytes]] = {}
    mirrored = 0
    for position in range(400):
        sample = kept[position]
        seen.setdefault(sample["index"], set()).add(sample["video"].numpy().tobytes())
        mirrored += "from right to left" in sample["caption"]
    assert all(len(looks) == 6 for looks in seen.values()), "three crops and their mirror images"
    assert 150 < mirrored < 250
    cuts = [kept_cut(config, "train", 4, crop) for crop in range(3)]
    assert len(set(cuts)) == 3 and kept_cut(config, "validation", 4, 2) == kept_cut(config, "validation", 0, 0)


def test_a_mirrored_caption_comes_with_a_mirrored_clip(tmp_path: Path) -> None:
    config = files(tmp_path, horizontal_flip=1.0)
    turned, plain = cached(config, tmp_path / "a"), cached(replace(config, horizontal_flip=0.0), tmp_path / "b")
    for position in range(12):
        ours, theirs = turned[position], plain[position]
        assert ours["caption"] == theirs["caption"].replace("from left to right", "from right to left")
        assert not torch.equal(ours["video"], theirs["video"])
        # every second pixel was kept, so the mirror image shows the ones between
        full = clips(config)[position]["video"]
        assert torch.equal(ours["video"], full[:, :, ::2, ::2])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_read_a_cache_too(tmp_path: Path, num_workers: int) -> None:
    kept = cached(files(tmp_path, horizontal_flip=0.5), tmp_path / "cache")
    alone = list(itertools.islice(batches(kept, batch_size=2), 6))
    for ours, theirs in zip(batches(kept, batch_size=2, num_workers=num_workers, num_batches=6), alone, strict=True):
        assert torch.equal(ours.video, theirs.video) and replace(ours, video=theirs.video) == theirs


def test_the_files_may_be_gone(tmp_path: Path) -> None:
    config = files(tmp_path)
    cache = written(config, tmp_path / "cache")
    for file in tmp_path.glob("*.mp4"):
        file.unlink()
    kept = CachedLatents(config, split="train", seed=0, batch_size=2, cache=cache)
    assert len(kept) == 7 and kept[0]["video"].dtype == torch.uint8
    assert kept.captions[0].startswith("pushing a ball")


def test_a_cache_of_nothing_but_problems_is_one_sentence(tmp_path: Path) -> None:
    config = files(tmp_path, max_bad_share=1.0)
    for file in tmp_path.glob("*.mp4"):
        file.write_bytes(b"no video")
    kept = cached(config, tmp_path / "cache")
    assert isinstance(kept.entry(0), Entry) and kept.entry(0).problem and kept.sample_bytes == 0
    with pytest.raises(UserError, match=r"none of 7 clips of .* can be read"):
        next(batches(kept, batch_size=2, num_workers=1))
