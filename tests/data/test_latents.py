"""Clips encoded once: the same stream as of pixels, each clip cut from its middle."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from vdm.data.dataset import ClipDataset
from vdm.data.latents import KeptLatents
from vdm.data.loader import batches
from vdm.data.mini_something import write_ssv2
from vdm.data.settings import DataConfig
from vdm.data.transforms import Crop
from vdm.data.video import read_clip, to_float, to_video
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
