"""Real clips of every oddity against a full decode, frame after frame, which is right by its simplicity."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.frame import VideoFrame

from vdm.data import video
from vdm.data.colour import ACCURATE
from vdm.data.transforms import Crop, Frames, resize_crop
from vdm.data.video import ShortClip, read_clip

# id -> extension, width and height as shown, frames that decode (README of the clips)
REAL_CLIPS = {
    "166766": (".webm", 427, 240, 49),
    "gulpio_test": (".webm", 256, 144, 140),
    "pancake_flip": (".mkv", 426, 240, 310),
    "arm_wrestling": (".mp4", 340, 256, 280),
    "eye_makeup": (".avi", 320, 240, 164),
    "pouring_coffee": (".mp4", 1280, 720, 287),
    "cup_shuffle": (".mp4", 1280, 720, 300),
    "bottles_long": (".mp4", 640, 360, 1189),
    "street_walk_5frames": (".mp4", 960, 540, 5),
    "dog_snow_5fps": (".mp4", 640, 480, 40),
    "nasa_rot270": (".mp4", 270, 480, 17),
    "camera_left_rot180_vfr": (".mp4", 1280, 720, 25),
    "broken/corrupted_tail": (".mp4", 1280, 720, 28),
    "broken/av1_undecodable": (".mkv", 640, 360, 125),
}


def every_frame(path: Path) -> tuple[list[float], list[VideoFrame]]:
    """All frames of a file in the order in which they are shown, and the seconds at which they are; all in memory."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    stamps = [float(frame.pts * frame.time_base) for frame in frames]
    return [stamp - min(stamps) for stamp in sorted(stamps)], frames


def due(times: Sequence[float], *, fps: float, num_frames: int, first: float) -> list[int]:
    """By a loop over the moments: the last frame that is shown by then, to the millisecond to which stamps are kept."""
    moments = [first + number / fps for number in range(num_frames)]
    return [max(index for index, time in enumerate(times) if time <= moment + 0.001) for moment in moments]


def careful(frame: VideoFrame) -> Frames:
    """uint8 (H,W,3) by libav's best conversion, turned as the metadata asks."""
    pixels = np.asarray(frame.to_ndarray(format="rgb24", interpolation=ACCURATE))
    return np.rot90(pixels, k=round(frame.rotation / 90))


def assert_shows(clip: Frames, frames: Sequence[VideoFrame], wanted: Sequence[int], crop: Crop | None = None) -> None:
    """Each frame of the clip is the one wanted, to within the rounding of colours."""
    assert len(clip) == len(wanted)
    for ours, index in zip(clip, wanted, strict=True):
        want = careful(frames[index])
        want = want if crop is None else resize_crop(want[None], crop)[0]
        assert np.abs(ours.astype(float) - want).mean() < 1.0, index


def slack(times: Sequence[float], *, fps: float, num_frames: int) -> float:
    return max(0.0, times[-1] - (num_frames - 1) / fps)


@pytest.mark.parametrize("name", [name for name in REAL_CLIPS if name not in ("broken/corrupted_tail", "bottles_long")])
@pytest.mark.parametrize("crop", [None, Crop(128, 128, 0.2, 0.9)])
def test_every_clip_shows_the_frames_that_are_due(clips_dir: Path, name: str, crop: Crop | None) -> None:
    path = clips_dir / f"{name}{REAL_CLIPS[name][0]}"
    times, frames = every_frame(path)
    assert len(frames) == REAL_CLIPS[name][3]
    for fps, num_frames, start in ((8.0, 16, 0.3), (12.0, 24, 1.0)):
        wanted = due(times, fps=fps, num_frames=num_frames, first=start * slack(times, fps=fps, num_frames=num_frames))
        clip = read_clip(path, fps=fps, num_frames=num_frames, start=start, crop=crop)
        assert_shows(clip, frames, wanted, crop)


def test_the_real_something_something_clip(clips_dir: Path) -> None:
    """Stamps 83 and 84 milliseconds apart: every frame once at 12 fps, two of three at 8."""
    path = clips_dir / "166766.webm"
    times, frames = every_frame(path)
    assert {round(1000 * (b - a)) for a, b in zip(times, times[1:], strict=False)} == {83, 84}
    assert_shows(read_clip(path, fps=12, num_frames=49), frames, range(49))
    assert_shows(read_clip(path, fps=8, num_frames=16, start=0), frames, [i * 3 // 2 for i in range(16)])


@pytest.mark.parametrize(("name", "turns"), [("nasa_rot270", 1), ("camera_left_rot180_vfr", 2)])
def test_the_rotated_clips_stand_upright(clips_dir: Path, name: str, turns: int) -> None:
    path = clips_dir / f"{name}.mp4"
    _, frames = every_frame(path)
    stored = np.asarray(frames[0].to_ndarray(format="rgb24", interpolation=ACCURATE))
    ours = read_clip(path, fps=10, num_frames=1, start=0)[0]
    assert ours.shape == (REAL_CLIPS[name][2], REAL_CLIPS[name][1], 3)
    assert np.abs(ours.astype(float) - np.rot90(stored, turns)).mean() < 1.0
    assert np.abs(ours.astype(float) - np.rot90(stored, turns + 2)).mean() > 10
    done, theirs = cv2.VideoCapture(str(path)).read()  # OpenCV applies the metadata by itself
    assert done and np.abs(ours.astype(float) - theirs[..., ::-1]).mean() < 4.0


def test_the_variable_rate_clip_goes_by_its_stamps(clips_dir: Path) -> None:
    path = clips_dir / "camera_left_rot180_vfr.mp4"
    times, frames = every_frame(path)
    gaps = np.diff(times)
    assert gaps.max() > 1.2 * gaps.min()
    rate = (len(times) - 1) / times[-1]
    wanted = due(times, fps=30, num_frames=68, first=0.0)
    counted = [int(i * rate / 30) for i in range(68)]
    assert sum(a != b for a, b in zip(wanted, counted, strict=True)) > 3, "counting frames goes wrong here"
    assert_shows(read_clip(path, fps=30, num_frames=68, start=0), frames, wanted)


@pytest.mark.parametrize("name", ["gulpio_test", "pancake_flip"])
def test_the_clips_whose_header_counts_a_frame_too_many_end_with_their_last(clips_dir: Path, name: str) -> None:
    path = clips_dir / f"{name}{REAL_CLIPS[name][0]}"
    times, frames = every_frame(path)
    assert int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)) == len(frames) + 1
    clip = read_clip(path, fps=8, num_frames=16, start=1)
    assert_shows(clip[-1:], frames, [len(frames) - 1])


def test_the_five_frame_clip_holds_loops_or_drops_out(clips_dir: Path) -> None:
    path = clips_dir / "street_walk_5frames.mp4"
    _, frames = every_frame(path)
    assert_shows(read_clip(path, fps=5, num_frames=8, short="hold"), frames, [0, 1, 2, 3, 4, 4, 4, 4])
    assert_shows(read_clip(path, fps=5, num_frames=8, short="loop"), frames, [0, 1, 2, 3, 4, 0, 1, 2])
    with pytest.raises(ShortClip, match=r"lasts 1.00 seconds, and 8 frames at 5 fps more"):
        read_clip(path, fps=5, num_frames=8, short="drop")
    assert len(read_clip(path, fps=5, num_frames=5, short="drop")) == 5


def test_the_1189_frame_clip_is_never_in_memory_as_a_whole(clips_dir: Path) -> None:
    path = clips_dir / "bottles_long.mp4"
    times, frames = every_frame(path)
    crop = Crop(128, 128)
    wanted = due(times, fps=8, num_frames=24, first=slack(times, fps=8, num_frames=24))
    assert wanted[-1] == 1188
    tracemalloc.start()
    clip = read_clip(path, fps=8, num_frames=24, start=1, crop=crop)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_shows(clip, frames, wanted, crop)
    assert peak < 2 * clip.nbytes, "1189 frames of 640x360 are 822 MB"


@pytest.mark.parametrize("name", REAL_CLIPS)
def test_real_clips_have_the_frames_that_their_readme_counts(clips_dir, name):
    extension, width, height, count = REAL_CLIPS[name]
    path = clips_dir / f"{name}{extension}"
    kept, times = video._decode(path, np.array([0]))
    assert kept[0].shape == (height, width, 3)
    assert len(video._decode(path, video.ALL)[1]) == count
    with video._opened(path) as opened:
        assert len(video._demuxed(*opened)[1]) == (50 if name == "broken/corrupted_tail" else count)


def test_stamps_that_run_backwards_do_not_shuffle_the_picture(clips_dir):
    frames = read_clip(clips_dir / "eye_makeup.avi", fps=25, num_frames=40, start=0).astype(float)

    def change(order: list[int]) -> float:
        return float(np.abs(np.diff(frames[order], axis=0)).mean())

    swapped = [index ^ 1 for index in range(40)]
    assert change(list(range(40))) < 0.8 * change(swapped)
