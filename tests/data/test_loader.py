from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdm.data import loader
from vdm.data.dataset import VALIDATION_OFFSET, ClipDataset
from vdm.data.loader import Batch, batches
from vdm.data.mini_something import render_clip, write_ssv2
from vdm.data.quarantine import BadClips
from vdm.data.settings import DataConfig
from vdm.data.sources import Cut
from vdm.data.transforms import Crop
from vdm.data.video import read_clip, to_video, write_video
from vdm.errors import UserError

TINY = DataConfig(num_clips=6, height=16, width=24, min_frames=2, max_frames=4, validation_clips=3)


def dataset(config: DataConfig = TINY, *, split: str = "train", seed: int = 0, batch_size: int = 4) -> ClipDataset:
    return ClipDataset(config, split=split, seed=seed, batch_size=batch_size)


def take(source: ClipDataset, count: int, **options) -> list[Batch]:
    return list(itertools.islice(batches(source, batch_size=source.batch_size, **options), count))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.video, b.video)
        assert replace(a, video=b.video) == b


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Twelve small clips in SSv2 layout."""
    root = tmp_path_factory.mktemp("written") / "set"
    write_ssv2(root, num_clips=12, size=32, num_frames=8, fps=8, seed=3)
    return root


def files_config(root: Path, **changes) -> DataConfig:
    return replace(TINY, format="ssv2", root=str(root), **{"num_clips": None, **changes})


def spoil(root: Path, copy: Path, names: list[str]) -> Path:
    """A copy of a data set in which some clips are no videos."""
    shutil.copytree(root, copy)
    for name in names:
        next(copy.glob(f"*/{name}.mp4")).write_bytes(b"not a video")
    return copy


# --- the stream ---


@given(st.integers(1, 50), st.integers(0, 2**31), st.integers(0, 3))
@settings(max_examples=30)
def test_an_epoch_visits_every_clip_once(num_clips, seed, epoch):
    clips = dataset(replace(TINY, num_clips=num_clips), seed=seed)
    order = [clips._clip_at(epoch * num_clips + place) for place in range(num_clips)]
    assert sorted(order) == list(range(num_clips))


def test_epochs_and_seeds_differ_in_order():
    clips = dataset(replace(TINY, num_clips=100))
    first, second = ([clips._clip_at(epoch * 100 + place) for place in range(100)] for epoch in (0, 1))
    other = [dataset(replace(TINY, num_clips=100), seed=1)._clip_at(place) for place in range(100)]
    assert first != second and first != other and first != list(range(100))


def test_a_sample_is_a_clip_with_its_caption():
    sample = dataset()[7]
    clip = render_clip(sample["index"], seed=0, height=16, width=24, num_frames=sample["video"].shape[1], fps=8)
    assert sample["video"].dtype == torch.uint8 and sample["video"].shape[::2] == (3, 16)
    assert torch.equal(sample["video"], to_video(clip.frames))
    assert (sample["caption"], sample["id"], sample["position"], sample["bad"]) == (clip.label, clip.id, 7, [])


@pytest.mark.parametrize("kind", ["mini-something", "ssv2"])
def test_a_sample_depends_on_seed_and_position_alone(kind, written):
    config = TINY if kind == "mini-something" else files_config(written)
    forwards = dataset(config)
    backwards = dataset(config)
    ahead = [forwards[position] for position in range(20)]
    behind = [backwards[position] for position in reversed(range(20))][::-1]
    for a, b in zip(ahead, behind, strict=True):
        assert torch.equal(a["video"], b["video"]) and a["id"] == b["id"]
    assert any(not torch.equal(a["video"], dataset(config, seed=1)[p]["video"]) for p, a in enumerate(ahead[:3]))


def test_all_clips_of_a_global_batch_have_one_length_and_all_lengths_come_up():
    clips = dataset(replace(TINY, min_frames=2, max_frames=5), batch_size=4)
    lengths = [clips._cut_at(position).num_frames for position in range(400)]
    by_batch = np.array(lengths).reshape(100, 4)
    assert (by_batch == by_batch[:, :1]).all()
    assert set(lengths) == {2, 3, 4, 5}


def test_crops_and_starts_spread_over_their_range():
    clips = dataset(replace(TINY, num_clips=1))
    cuts = [clips._cut_at(position) for position in range(400)]
    for name in ("start", "x", "y"):
        drawn = np.array([getattr(cut, name) for cut in cuts])
        assert 0 <= drawn.min() < 0.05 and 0.95 < drawn.max() <= 1 and abs(drawn.mean() - 0.5) < 0.06
    assert abs(np.corrcoef([(cut.start, cut.x, cut.y) for cut in cuts], rowvar=False)[0, 1]) < 0.15


def test_files_are_cut_where_the_draw_says(written):
    config = files_config(written, height=16, width=10, min_frames=3, max_frames=3)
    clips = dataset(config)
    for position in range(5):
        cut, sample = clips._cut_at(position), clips[position]
        path = next(written.glob(f"*/{sample['id']}.mp4"))
        crop = Crop(height=16, width=10, x=cut.x, y=cut.y)
        expected = read_clip(path, fps=8, num_frames=3, start=cut.start, crop=crop)
        assert torch.equal(sample["video"], to_video(expected))


def test_validation_is_fixed_and_apart_from_training():
    clips = dataset(split="validation", seed=5)
    assert len(clips) == 3
    assert [clips[position]["index"] for position in range(3)] == [0, 1, 2]
    first = render_clip(VALIDATION_OFFSET, seed=5, height=16, width=24, num_frames=TINY.max_frames, fps=8)
    assert torch.equal(clips[0]["video"], to_video(first.frames))
    assert clips[0]["id"] == first.id and int(first.id) >= 10**9  # no training set is as large
    with pytest.raises(IndexError):
        clips[3]
    with pytest.raises(IndexError):
        dataset()[-1]


def test_validation_of_files_is_cut_from_the_middle_and_limited(written):
    clips = dataset(files_config(written, validation_clips=1), split="validation")
    assert len(clips) == 1 and clips._cut_at(0) == Cut(4, 0.5, 0.5, 0.5)
    assert dataset(files_config(written), split="validation").num_clips == 1  # a tenth of 12


def test_captions_are_those_of_the_samples(written):
    for config in (TINY, files_config(written)):
        clips = dataset(config)
        assert len(clips.captions) == len(clips) == clips.num_clips
        for position in range(4):
            sample = clips[position]
            assert clips.captions[sample["index"]] == sample["caption"]


def test_rendered_and_written_clips_are_the_same_data(written):
    """The files of `data synth` and the clips rendered on the fly, but for what the codec loses."""
    from_files = dataset(files_config(written, height=32, width=32, min_frames=8, max_frames=8))
    sample = from_files[0]
    clip = render_clip(int(sample["id"]), seed=3, height=32, width=32, num_frames=8, fps=8)
    assert sample["caption"] == clip.label
    assert (sample["video"].float() - to_video(clip.frames).float()).abs().mean() < 4


def test_folders_of_videos_with_captions(tmp_path):
    for number in range(10):
        frames = render_clip(number, seed=0, height=16, width=16, num_frames=4, fps=8).frames
        write_video(tmp_path / f"{number}.mp4", frames, fps=8)
        (tmp_path / f"{number}.txt").write_text(f"caption {number}")
    config = replace(TINY, format="folder", root=str(tmp_path), num_clips=None)
    assert len(dataset(config)) == 9
    [batch] = take(dataset(config), 1)
    assert batch.video.shape[0] == 4 and batch.captions == [f"caption {name}" for name in batch.ids]


# --- batches ---


@pytest.mark.parametrize("num_workers", [0, 2])
def test_entering_at_batch_k_is_skipping_k_batches(num_workers, written):
    for config in (TINY, files_config(written)):
        clips = dataset(config)
        whole = take(clips, 6)
        assert_same(take(clips, 6, num_workers=num_workers), whole)
        assert_same(take(clips, 3, start_batch=3, num_workers=num_workers), whole[3:])
        part = batches(clips, batch_size=4, start_batch=2, num_batches=3, num_workers=num_workers)
        assert_same(list(part), whole[2:5])


def test_micro_batches_make_up_the_global_batch():
    clips = dataset(batch_size=4)
    whole = take(clips, 2)
    parts = list(batches(clips, batch_size=2, num_batches=4))
    assert [part.positions for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for number, batch in enumerate(whole):
        assert torch.equal(torch.cat([part.video for part in parts[2 * number : 2 * number + 2]]), batch.video)
    with pytest.raises(AssertionError):
        next(batches(clips, batch_size=3))


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 40), st.integers(1, 6))
@settings(max_examples=40)
def test_the_order_is_the_same_for_any_number_of_ranks_and_any_resume(num_ranks, micro_steps, start, num_steps):
    """Whoever reads a position reads the same clip, crop, length and words; together the ranks read each once."""
    config = replace(TINY, min_frames=2, num_clips=7, horizontal_flip=0.5, natural_captions=0.5)
    size = 2
    whole = dataset(config, batch_size=size * num_ranks * (micro_steps + 1))
    first = start * num_ranks * (micro_steps + 1)  # a resume falls between two steps
    seen: dict[int, tuple] = {}
    for rank in range(num_ranks):
        own = dataset(config, batch_size=whole.batch_size)
        numbers = itertools.islice(itertools.count(first + rank, num_ranks), num_steps)
        for span in loader._spans(size, numbers, None):
            for position in span:
                assert position not in seen
                seen[position] = own._clip_at(position), own._cut_at(position)
    assert sorted(seen) == list(range(size * first, size * (first + num_ranks * num_steps)))
    assert seen == {position: (whole._clip_at(position), whole._cut_at(position)) for position in seen}


def test_ranks_share_the_stream(written):
    clips = dataset(files_config(written, horizontal_flip=0.5, color_jitter=0.2), batch_size=4)
    whole = take(clips, 6)
    for num_workers in (0, 1):
        for rank in range(3):
            options = {"rank": rank, "num_ranks": 3, "num_workers": num_workers}
            assert_same(list(batches(clips, batch_size=4, num_batches=2, **options)), whole[rank::3])


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_stream_with_everything_on_does_not_know_how_many_workers_there_are(written, num_workers):
    config = files_config(
        written, horizontal_flip=0.5, color_jitter=0.2, natural_captions=0.5, min_frames=2, short_clips="loop"
    )
    assert_same(take(dataset(config), 7, num_workers=num_workers), take(dataset(config), 7))


class Faulty(ClipDataset):
    """Has a clip, the third, on which decoders hang, or die: each of them, or the first."""

    fault = "hang"
    mark = Path()

    def attempt(self, position, index):
        if index == 2:
            if self.fault == "hang":
                time.sleep(60)
            if self.fault == "die" or not self.mark.exists():
                self.mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().attempt(position, index)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("hang", "its decoder took more than 1 seconds and was killed"), ("die", "its decoder died (exit code -9)")],
)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_decoder_that_hangs_or_dies_costs_its_clip_alone(fault, reason, num_workers):
    clips = Faulty(replace(TINY, decode_timeout=1.0), split="train", seed=0, batch_size=4)
    clips.fault = fault
    began = time.monotonic()
    got = take(clips, 6, num_workers=num_workers)  # four epochs of the six clips
    assert time.monotonic() - began < 25
    plain = take(dataset(), 6)
    for batch, want in zip(got, plain, strict=True):
        assert batch.positions == want.positions
        assert batch.indices == [3 if index == 2 else index for index in want.indices], "the neighbour stands in"
        assert batch.bad == [(clips.source.id(2), reason)] * want.indices.count(2)
    assert clips.given_up == {2: reason}, "and is not tried again"


def test_one_death_may_be_for_want_of_memory_and_costs_nothing(tmp_path):
    clips = Faulty(TINY, split="train", seed=0, batch_size=4)
    clips.fault, clips.mark = "die once", tmp_path / "died"
    assert_same(take(clips, 4, num_workers=2), take(dataset(), 4))
    assert clips.mark.exists() and not clips.given_up


def test_when_all_decoders_die_the_run_stops_with_a_sentence():
    clips = Faulty(replace(TINY, num_clips=3), split="train", seed=0, batch_size=4)
    clips.fault, clips.num_clips = "die", 3
    clips.candidates = lambda position: [2]
    with pytest.raises(UserError, match=r"none of 3 clips .* can be read \(first: 2: its decoder died"):
        take(clips, 1, num_workers=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_ends_after_one_pass(num_workers):
    clips = dataset(split="validation")
    got = list(batches(clips, batch_size=2, num_workers=num_workers))
    assert [batch.positions for batch in got] == [[0, 1], [2]]
    assert list(batches(clips, batch_size=2, start_batch=2)) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generators_are_left_alone(num_workers):
    torch.manual_seed(0)
    np.random.seed(0)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(dataset(), 2, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], before_numpy)


def test_no_worker_outlives_its_stream(written, tmp_path):
    take(dataset(), 1, num_workers=2)
    assert multiprocessing.active_children() == []
    list(batches(dataset(split="validation"), batch_size=2, num_workers=2))
    assert multiprocessing.active_children() == []
    root = spoil(written, tmp_path / "copy", [str(number) for number in range(12)])
    stream = batches(dataset(files_config(root, max_bad_share=1.0)), batch_size=4, num_workers=2)
    with pytest.raises(UserError):
        next(stream)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("wish", "gpu", "count"), [(True, True, 2), (False, True, 0), (True, False, 0)])
def test_batches_are_pinned_where_that_is_wished_for_and_there_is_a_gpu(monkeypatch, wish, gpu, count):
    pinned = []

    def pin(tensor):
        pinned.append(tensor.shape)
        return tensor + 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    assert_same(take(dataset(), 2, pin_memory=wish), take(dataset(), 2))
    assert len(pinned) == count


# --- bad clips ---


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_clip_is_named_and_its_neighbour_stands_in(written, tmp_path, num_workers):
    root = spoil(written, tmp_path / "copy", ["4"])
    clips = dataset(files_config(root, max_bad_share=0.5), batch_size=11)
    [batch] = take(clips, 1, num_workers=num_workers)
    [(name, reason)] = batch.bad
    assert name == "4" and reason.startswith("4.mp4 cannot be read: ")
    assert "4" not in batch.ids and batch.ids.count("5") == 2
    assert_same(take(clips, 1), [batch])


def test_bad_clips_warn_once_each_and_too_many_are_refused(written, tmp_path, capsys):
    root = spoil(written, tmp_path / "copy", ["4", "7", "8"])
    clips = dataset(files_config(root, max_bad_share=0.2), batch_size=11)
    bad_clips = BadClips(clips)
    bad_clips.note([("4", "worn out"), ("7", "torn")])
    bad_clips.note([("4", "worn out")])
    assert capsys.readouterr().err.splitlines() == [
        "warning: clip 4 is left out: worn out",
        "warning: clip 7 is left out: torn",
    ]
    [batch] = take(clips, 1)
    with pytest.raises(UserError) as caught:
        bad_clips.note(batch.bad)
    assert str(caught.value).startswith(
        "3 of 11 clips (27 %) cannot be read (first: 4: worn out); limit data.max_bad_share=0.2"
    )
    assert capsys.readouterr().err.startswith("warning: clip 8 is left out: 8.mp4 cannot be read: ")


def test_missing_files_count_from_the_start(written, tmp_path, capsys):
    shutil.copytree(written, tmp_path / "copy")
    next((tmp_path / "copy").glob("*/3.mp4")).unlink()
    with pytest.raises(UserError, match=r"1 of 11 clips \(9 %\) cannot be read \(first: 3: no file\); limit data"):
        dataset(files_config(tmp_path / "copy"))
    clips = dataset(files_config(tmp_path / "copy", max_bad_share=0.1))
    assert len(clips) == 10 and clips.missing == [("3", "no file")]
    bad_clips = BadClips(clips)
    assert capsys.readouterr().err == "warning: clip 3 is left out: no file\n"
    with pytest.raises(UserError, match="2 of 11 clips"):
        bad_clips.note([("5", "torn")])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_set_without_a_readable_clip_is_one_sentence(written, tmp_path, num_workers):
    root = spoil(written, tmp_path / "copy", [str(number) for number in range(12)])
    clips = dataset(files_config(root, max_bad_share=1.0))
    with pytest.raises(UserError, match=r"^none of 11 clips of .*copy can be read \(first: ") as caught:
        take(clips, 1, num_workers=num_workers)
    assert "\n" not in str(caught.value)


def test_a_set_whose_captions_are_all_missing(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.mp4").write_bytes(b"x")
    config = replace(TINY, format="folder", root=str(tmp_path), max_bad_share=1.0)
    with pytest.raises(UserError, match=r"no train clip of .* can be used \(first: 0: no caption file 0\.txt\)"):
        dataset(config)


# --- configuration ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_clips": 0}, "data.num_clips must be at least 1 or null, got 0"),
        ({"min_frames": 0}, "data.min_frames must be at least 1"),
        ({"validation_clips": 0}, "data.validation_clips"),
        ({"height": -8}, "data.height"),
        ({"min_frames": 5, "max_frames": 4}, "data.max_frames=4 is below data.min_frames=5"),
        ({"fps": 0.0}, "data.fps must be above 0"),
        ({"fps": float("nan")}, "data.fps must be above 0"),
        ({"dataloader_num_workers": -1}, "data.dataloader_num_workers"),
        ({"decode_timeout": -1.0}, "data.decode_timeout must be 0 to 1e\\+06 seconds"),
        ({"max_bad_share": 1.1}, "data.max_bad_share must be between 0 and 1"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(TINY, **changes)


def test_root_and_format_must_agree():
    with pytest.raises(UserError, match=r"data\.root=somewhere is set, but data\.format=mini-something"):
        dataset(replace(TINY, root="somewhere"))
    for kind in ("ssv2", "folder"):
        with pytest.raises(UserError, match=rf"data\.format={kind} reads files; set data\.root"):
            dataset(replace(TINY, format=kind))


# --- real clips ---


def test_every_real_clip_comes_through_the_whole_path(clips_dir):
    config = DataConfig(format="ssv2", root=str(clips_dir))
    seen: dict[str, str] = {}
    for split in ("train", "validation"):
        clips = dataset(config, split=split, batch_size=1)
        for position in range(len(clips)):
            sample = clips[position]
            seen[sample["id"]] = sample["caption"]
            assert sample["video"].shape == (3, 16, 256, 256) and sample["bad"] == []
            assert sample["video"].float().std() > 6
    assert seen == {line["id"]: line["label"] for line in json.loads((clips_dir / "annotations.json").read_text())}


def test_the_broken_folder_survives(clips_dir):
    """A damaged end and AV1: both give frames here."""
    config = DataConfig(format="ssv2", root=str(clips_dir / "broken"))
    got = [dataset(config, split=split, batch_size=1)[0] for split in ("train", "validation")]
    assert {sample["id"] for sample in got} == {"corrupted_tail", "av1_undecodable"}
    assert all(sample["video"].shape == (3, 16, 256, 256) and sample["video"].float().std() > 6 for sample in got)


# --- subsets ---


def test_a_number_of_clips_is_drawn_once_and_for_all(written):
    config = files_config(written, num_clips=5)
    ids = [clip.id for clip in dataset(config).source.clips]
    assert len(ids) == 5
    assert ids == [clip.id for clip in dataset(config, seed=9).source.clips], "the run's own seed does not matter"
    assert ids != [clip.id for clip in dataset(replace(config, subset_seed=1)).source.clips]
    everything = dataset(files_config(written)).source.clips
    first = dataset(replace(config, subset_order="first")).source.clips
    assert first == everything[:5]
    held_out = dataset(files_config(written, validation_clips=99), split="validation").source.clips
    assert dataset(replace(config, validation_clips=99), split="validation").source.clips == held_out, (
        "not of validation"
    )


def test_templates_are_chosen_and_capped(written):
    clips = dataset(files_config(written)).source.clips
    template = clips[0].template
    assert template
    chosen = dataset(files_config(written, templates=(template.replace("[", "").replace("]", ""),))).source.clips
    assert chosen == [clip for clip in clips if clip.template == template]
    capped = dataset(files_config(written, max_clips_per_template=1)).source.clips
    assert len(capped) == len({clip.template for clip in clips}) == len({clip.template for clip in capped})
    with pytest.raises(UserError, match=r"no clip has the template 'Pushing .*; did you mean|no clip has the template"):
        dataset(files_config(written, templates=("Pushing somthing",)))
    with pytest.raises(UserError, match="choose among files"):
        dataset(replace(TINY, templates=(template,)))


def test_part_of_the_videos_is_enough_for_a_subset(written, tmp_path):
    """The full annotations and some of the files, as when one has not downloaded all."""
    copy = tmp_path / "copy"
    shutil.copytree(written, copy)
    for clip in dataset(files_config(copy)).source.clips[:7]:
        next(copy.glob(f"*/{clip.id}.*")).unlink()
    with pytest.raises(UserError, match="no file"):
        dataset(files_config(copy))
    clips = dataset(files_config(copy, num_clips=3))
    assert len(clips) == 3 and clips.missing == []
    with pytest.raises(UserError, match="no file"):
        dataset(files_config(copy, num_clips=9))


def test_part_of_the_videos_is_enough_to_validate_with(tmp_path):
    write_ssv2(tmp_path, num_clips=30, size=16, num_frames=2, fps=8, seed=0)
    held_out = dataset(files_config(tmp_path, validation_clips=3), split="validation").source.clips
    assert len(held_out) == 3
    next(tmp_path.glob(f"*/{held_out[0].id}.*")).unlink()
    clips = dataset(files_config(tmp_path, validation_clips=2), split="validation")
    assert clips.source.clips == held_out[1:] and clips.missing == []
    with pytest.raises(UserError, match="no file"):
        dataset(files_config(tmp_path, validation_clips=3), split="validation")
    file = tmp_path / "validation.json"
    entries = json.loads(file.read_text())
    file.write_text(
        json.dumps([{**entry, "label": "", "template": ""} if i == 1 else entry for i, entry in enumerate(entries)])
    )
    with pytest.raises(UserError, match="1 of 2 clips"):
        dataset(files_config(tmp_path, validation_clips=1), split="validation")  # nobody has left out a caption


# --- short clips ---


def test_short_clips_hold_loop_or_drop_out(tmp_path):
    for name, frames in (("short", 4), ("long", 16)):
        clip = render_clip(0, seed=0, height=16, width=16, num_frames=frames, fps=8).frames
        for i in range(4):
            write_video(tmp_path / f"{name}{i}.mp4", clip, fps=8)
            (tmp_path / f"{name}{i}.txt").write_text(name)
    base = replace(
        TINY, format="folder", root=str(tmp_path), num_clips=None, min_frames=8, max_frames=8, height=16, width=16
    )
    held, looped = (dataset(replace(base, short_clips=policy)) for policy in ("hold", "loop"))
    position = next(i for i in range(len(held)) if held[i]["caption"] == "short")
    video, again = held[position]["video"], looped[position]["video"]
    assert torch.equal(video[:, :4], again[:, :4]) and torch.equal(again[:, :4], again[:, 4:])
    assert all(torch.equal(video[:, 3], video[:, i]) for i in range(4, 8))
    dropped = dataset(replace(base, short_clips="drop"))
    samples = [dropped[i] for i in range(2 * len(dropped))]
    assert {sample["caption"] for sample in samples} == {"long"}
    assert all(sample["bad"] == [] for sample in samples), "they are not bad, only short"
    with pytest.raises(UserError, match="too short for 999 frames at 8 fps; set data.short_clips to hold or loop"):
        dataset(replace(base, short_clips="drop", min_frames=999, max_frames=999))[0]


# --- other looks and words ---


def test_a_mirrored_clip_has_a_mirrored_caption(written):
    plain, turned = dataset(files_config(written)), dataset(files_config(written, horizontal_flip=1.0))
    seen = set()
    for position in range(2 * len(plain)):
        one, other = plain[position], turned[position]
        assert torch.equal(one["video"].flip(3), other["video"])
        words = one["caption"].split()
        swapped = [{"left": "right", "right": "left"}.get(word, word) for word in words]
        assert other["caption"].split() == swapped
        seen.add(words != swapped)
    assert seen == {True, False}


def test_half_of_the_clips_are_mirrored_by_lot():
    config = replace(TINY, num_clips=100, min_frames=2, max_frames=2)
    plain, some = dataset(config), dataset(replace(config, horizontal_flip=0.5))
    turned = [not torch.equal(plain[i]["video"], some[i]["video"]) for i in range(100)]
    assert 30 < sum(turned) < 70
    again = dataset(replace(config, horizontal_flip=0.5))
    assert all(torch.equal(some[i]["video"], again[i]["video"]) for i in (3, 77, 12))
    other = dataset(replace(config, horizontal_flip=0.5), seed=1)
    assert len(other) == 100


def test_validation_is_left_as_it_is(written):
    changes = {"horizontal_flip": 1.0, "color_jitter": 0.5, "natural_captions": 1.0, "crop": "centre"}
    plain, changed = (dataset(files_config(written, **c), split="validation") for c in ({}, changes))
    for i in range(len(plain)):
        assert torch.equal(plain[i]["video"], changed[i]["video"]) and plain[i]["caption"] == changed[i]["caption"]


def test_a_clip_never_changes_its_light_on_the_way():
    config = replace(TINY, min_frames=4, max_frames=4, num_clips=20)
    plain, lit = dataset(config), dataset(replace(config, color_jitter=0.3))
    ratios = []
    for i in range(20):
        before, after = (part[i]["video"].float().mean(dim=(0, 2, 3)) for part in (plain, lit))
        ratio = after / before
        assert ratio.std() < 0.02, "one draw a clip"
        ratios.append(ratio.mean().item())
    assert min(ratios) < 0.9 and max(ratios) > 1.1


def test_captions_are_said_in_several_ways(written):
    config = files_config(written, natural_captions=0.5, template_captions=0.25)
    plain, said = dataset(files_config(written)), dataset(config)
    kinds = {"label": 0, "template": 0, "natural": 0}
    for position in range(200):
        one, other = plain._clip_at(position), said[position]["caption"]
        clip = plain.source.clips[one]
        bare = clip.template.replace("[", "").replace("]", "").lower()
        kinds["label" if other == clip.caption else "template" if other == bare else "natural"] += 1
    assert all(share > 20 for share in kinds.values()), kinds
    assert kinds["natural"] > kinds["template"]


def test_the_middle_of_a_clip_where_the_crop_is_to_be_in_the_centre(written):
    config = files_config(written, min_frames=4, max_frames=4, crop="centre", height=16, width=16)
    clips = dataset(config)
    for position in (0, 5):
        clip = clips.source.clips[clips._clip_at(position)]
        middle = read_clip(clip.path, fps=8, num_frames=4, crop=Crop(height=16, width=16))
        assert torch.equal(clips[position]["video"], to_video(middle))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"horizontal_flip": 1.5}, "data.horizontal_flip must be between 0 and 1"),
        ({"color_jitter": -0.1}, "data.color_jitter must be between 0 and 1"),
        ({"natural_captions": 0.7, "template_captions": 0.7}, "are shares of one whole"),
        ({"num_clips": 0}, "data.num_clips must be at least 1 or null"),
        ({"max_clips_per_template": 0}, "data.max_clips_per_template must be at least 1 or null"),
    ],
)
def test_impossible_augmentations_are_named(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        replace(TINY, **changes)


@given(st.integers(0, 10_000))
@settings(max_examples=60)
def test_all_that_is_said_of_a_clip_is_foreseen(position):
    """A cache of texts must hold every wording that training may ask for, and a mirror image wherever one is wanted."""
    config = replace(TINY, horizontal_flip=0.5, natural_captions=0.6, template_captions=0.2)
    clips = dataset(config)
    words = clips.source.words(clips._clip_at(position))
    caption, mirrors = clips._said(words, position)
    texts, any_mirror = clips.wordings(words)
    assert caption in texts and any_mirror >= mirrors
    plain = dataset().wordings(words)
    assert plain == ({words.caption}, False)
