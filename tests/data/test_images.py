"""Images among the clips: which batches, which frames, and that all else stays as it is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vdm.data.dataset import ClipDataset
from vdm.data.loader import batches
from vdm.data.mini_something import render_clip, write_ssv2
from vdm.data.settings import DataConfig
from vdm.data.transforms import Crop
from vdm.data.video import read_clip, to_video
from vdm.errors import UserError

CONFIG = DataConfig(num_clips=5, height=16, width=16, min_frames=2, max_frames=6, validation_clips=3)


def dataset(share: float, *, batch_size: int = 2, seed: int = 0, config: DataConfig = CONFIG) -> ClipDataset:
    return ClipDataset(replace(config, image_batch_share=share), split="train", seed=seed, batch_size=batch_size)


def are_images(clips: ClipDataset, count: int) -> list[bool]:
    """Of the first global batches."""
    return [clips._cut_at(batch * clips.batch_size).only is not None for batch in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_so_many_global_batches_are_images(share: float) -> None:
    found = np.mean(are_images(dataset(share), 2000))
    assert abs(found - share) <= 3 * (share * (1 - share) / 2000) ** 0.5


def test_all_clips_of_a_global_batch_are_images_or_none_is() -> None:
    clips = dataset(0.5, batch_size=4)
    flags = [clips._cut_at(position).only is not None for position in range(400)]
    assert (np.reshape(flags, (100, 4)) == np.reshape(flags, (100, 4))[:, :1]).all()


def test_which_they_are_is_a_function_of_seed_and_number_of_the_batch() -> None:
    assert are_images(dataset(0.5), 50) == are_images(dataset(0.5, batch_size=8), 50)
    assert are_images(dataset(0.5), 50) != are_images(dataset(0.5, seed=1), 50)
    few, many = are_images(dataset(0.2), 50), are_images(dataset(0.6), 50)
    assert all(b or not a for a, b in zip(few, many, strict=True)), "a larger share adds images to those there were"


def test_batches_of_clips_stay_as_they_were_and_images_are_of_the_same_clips() -> None:
    plain, mixed = dataset(0.0), dataset(0.5)
    for position in range(24):
        ours, theirs = mixed[position], plain[position]
        if mixed._cut_at(position).only is None:
            assert torch.equal(ours["video"], theirs["video"])
        else:
            assert ours["video"].shape == (3, 1, 16, 16) and ours["video"].dtype == torch.uint8
        assert {**ours, "video": None} == {**theirs, "video": None}


def test_a_drawn_image_is_a_frame_of_the_drawn_clip_and_all_frames_come_up() -> None:
    clips = dataset(1.0)
    for position in range(8):
        sample, only = clips[position], clips._cut_at(position).only
        whole = render_clip(sample["index"], seed=0, height=16, width=16, num_frames=6, fps=8).frames
        assert only is not None
        assert torch.equal(sample["video"], to_video(whole[only : only + 1]))
    drawn = [clips._cut_at(position).only for position in range(600)]
    assert np.bincount(drawn, minlength=6).min() > 70 and max(drawn) == 5  # type: ignore[type-var]


@pytest.mark.parametrize("crop", ["random", "centre"])
def test_an_image_from_a_file_is_a_frame_of_the_longest_window(tmp_path: Path, crop: str) -> None:
    write_ssv2(tmp_path, num_clips=5, size=24, num_frames=20, fps=8.0, seed=0)
    config = replace(CONFIG, format="ssv2", root=str(tmp_path), num_clips=None, crop=crop)  # type: ignore[arg-type]
    clips = dataset(1.0, config=config)
    for position in range(6):
        cut, sample = clips._cut_at(position), clips[position]
        assert cut.only is not None and cut.num_frames == 6
        path = next(tmp_path.glob(f"*/{sample['id']}.mp4"))
        window = read_clip(path, fps=8, num_frames=6, start=cut.start, crop=Crop(16, 16, cut.x, cut.y))
        assert torch.equal(sample["video"], to_video(window[cut.only : cut.only + 1]))


def test_validation_stays_a_matter_of_clips() -> None:
    config = replace(CONFIG, image_batch_share=1.0)
    held = ClipDataset(config, split="validation", seed=0, batch_size=2)
    assert {held[position]["video"].shape[1] for position in range(3)} == {6}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_worker_and_rank_sees_the_same_stream(num_workers: int) -> None:
    clips = dataset(0.5, batch_size=4)
    whole = [clips[position] for position in range(16)]
    for rank in range(2):
        stream = batches(clips, batch_size=2, num_batches=4, num_workers=num_workers, rank=rank, num_ranks=2)
        for batch, first in zip(stream, itertools.count(2 * rank, 4), strict=False):
            assert torch.equal(batch.video, torch.stack([sample["video"] for sample in whole[first : first + 2]]))


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(UserError, match="data.image_batch_share must be between 0 and 1"):
        DataConfig(image_batch_share=share)
