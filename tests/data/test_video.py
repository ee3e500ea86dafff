from __future__ import annotations

import itertools
import os
import subprocess
import sys
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange
from hypothesis import given
from hypothesis import strategies as st

from vdm.data import video
from vdm.data.sheet import contact_sheet
from vdm.data.transforms import Crop
from vdm.data.video import UnreadableClip, read_clip, to_float, to_uint8, to_video, write_video
from vdm.errors import UserError


def grey_steps(count: int, *, height: int = 32, width: int = 48, step: int = 6) -> np.ndarray:
    """uint8 (count,H,W,3) whose frame i has the level 20 + step*i everywhere: a decoded frame tells its number."""
    levels = 20 + step * np.arange(count, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames: np.ndarray, *, step: int = 6) -> list[int]:
    return ((frames.mean(axis=(1, 2, 3)) - 20) / step).round().astype(int).tolist()


def moving_picture(count: int = 16, *, height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 (count,H,W,3), smooth in space and time."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin((x + 3 * t) / 20), np.cos((y + 2 * t) / 15), np.sin((x + y - t) / 25)]
    return (128 + 100 * np.stack(waves, axis=-1)).round().astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def encode(
    path: Path,
    frames: np.ndarray,
    *,
    stamps_ms: list[int] | None = None,
    rotation: int = 0,
    codec: str = "libx264",
    colour_range: ColorRange = ColorRange.MPEG,
    bframes: int = 3,
    title: str = "",
) -> None:
    """Write frames with stamps of one's own choice, and metadata that write_video never writes."""
    with av.open(str(path), "w") as container:
        options = {**video.X264, "bf": str(bframes)} if codec == "libx264" else {}
        if title:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=10, options={**options, "crf": "10"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.color_range = colour_range
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for index, pixels in enumerate(frames):
            frame = VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_color_range=colour_range)
            frame.pts = stamps_ms[index] if stamps_ms else 100 * index
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def listed(path: Path) -> tuple[list[av.Packet] | None, np.ndarray]:
    """The packets of a file, and the times that the container gives them."""
    with video._opened(path) as opened:
        return video._demuxed(*opened)


# --- reading ---


def test_what_is_written_is_read_back(tmp_path):
    frames = moving_picture()
    write_video(tmp_path / "clip.mp4", frames, fps=8)
    back = read_clip(tmp_path / "clip.mp4", fps=8, num_frames=16)
    assert back.shape == frames.shape and back.dtype == np.uint8
    assert psnr(back, frames) > 30
    assert np.abs(back.astype(float).mean(axis=(0, 1, 2)) - frames.mean(axis=(0, 1, 2))).max() < 1.5  # colours keep


@pytest.mark.parametrize("fps", [8, 12, 23.976, 29.97, 30])
def test_frames_come_in_order_and_are_all_there(tmp_path, fps):
    write_video(tmp_path / "clip.mp4", grey_steps(32), fps=fps)  # libx264 reorders them inside (B-frames)
    assert numbers(read_clip(tmp_path / "clip.mp4", fps=fps, num_frames=32)) == list(range(32))


def test_start_places_the_window(tmp_path):
    write_video(tmp_path / "clip.mp4", grey_steps(32), fps=16)
    for start, first in ((0, 0), (0.5, 12), (1, 24)):
        clip = read_clip(tmp_path / "clip.mp4", fps=16, num_frames=8, start=start)
        assert numbers(clip) == list(range(first, first + 8))


def test_other_rates_and_short_clips(tmp_path):
    write_video(tmp_path / "clip.mp4", grey_steps(8), fps=8)
    assert numbers(read_clip(tmp_path / "clip.mp4", fps=4, num_frames=4, start=0)) == [0, 2, 4, 6]
    assert numbers(read_clip(tmp_path / "clip.mp4", fps=16, num_frames=8, start=0)) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert numbers(read_clip(tmp_path / "clip.mp4", fps=8, num_frames=11)) == [*range(8), 7, 7, 7]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_goes_by_time(tmp_path, suffix):
    stamps = [0, 20, 40, 60, 500, 600, 1500, 2000]
    encode(tmp_path / f"clip{suffix}", grey_steps(8), stamps_ms=stamps)
    assert numbers(read_clip(tmp_path / f"clip{suffix}", fps=2, num_frames=5)) == [0, 4, 5, 6, 7]


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (-90, 3), (-180, 2)])
def test_rotation_metadata_is_applied(tmp_path, rotation, turns):
    frames = moving_picture(4)
    encode(tmp_path / "plain.mp4", frames)
    encode(tmp_path / "turned.mp4", frames, rotation=rotation)
    plain = read_clip(tmp_path / "plain.mp4", fps=10, num_frames=4)
    turned = read_clip(tmp_path / "turned.mp4", fps=10, num_frames=4)
    np.testing.assert_array_equal(turned, np.rot90(plain, k=turns, axes=(1, 2)))


def test_a_damaged_end_leaves_what_comes_before(clips_dir):
    clip = read_clip(clips_dir / "broken" / "corrupted_tail.mp4", fps=10, num_frames=28, start=1)
    assert len({frame.tobytes() for frame in clip}) == 28


def test_a_file_cut_short_gives_its_first_frames(tmp_path):
    frames = moving_picture(40, height=96, width=96)
    write_video(tmp_path / "whole.mp4", frames, fps=8)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    clip = read_clip(tmp_path / "cut.mp4", fps=8, num_frames=8, start=0)
    assert psnr(clip, frames[:8]) > 30


@pytest.mark.parametrize("content", [b"", b"hello, this is no video\n" * 50, bytes(range(256)) * 20])
def test_files_that_are_no_video_are_named_with_the_reason(tmp_path, content):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"clip\.mp4 cannot be read: \w+") as caught:
        read_clip(path, fps=8, num_frames=4)
    assert isinstance(caught.value, UnreadableClip) and caught.value.path == path
    assert "Errno" not in str(caught.value) and "avcodec" not in str(caught.value)


def test_an_mp4_that_ends_before_its_first_frame(tmp_path):
    write_video(tmp_path / "whole.mp4", moving_picture(8), fps=8)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "head.mp4").write_bytes(whole[: whole.index(b"mdat") + 4])
    with pytest.raises(UnreadableClip, match=r"head\.mp4 cannot be read"):
        read_clip(tmp_path / "head.mp4", fps=8, num_frames=4)


def test_a_file_whose_frames_are_all_damaged(tmp_path):
    write_video(tmp_path / "whole.mp4", moving_picture(8), fps=8)
    whole = (tmp_path / "whole.mp4").read_bytes()
    start = whole.index(b"mdat") + 4
    (tmp_path / "zeros.mp4").write_bytes(whole[:start] + bytes(len(whole) - start))
    with pytest.raises(UnreadableClip, match=r"zeros\.mp4 cannot be read: invalid data"):
        read_clip(tmp_path / "zeros.mp4", fps=8, num_frames=4)


def test_a_disk_error_while_listing_leaves_the_frames_before_it(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", grey_steps(12), fps=8)
    opened = video._opened

    class Failing:
        def __init__(self, container) -> None:
            self.container = container

        def demux(self, stream):
            yield from itertools.islice(self.container.demux(stream), 6)
            raise av.error.OSError(5, "Input/output error")

        def decode(self, stream):
            return self.container.decode(stream)

    @contextmanager
    def failing(path):
        with opened(path) as (container, stream):
            yield Failing(container), stream

    monkeypatch.setattr(video, "_opened", failing)
    assert numbers(read_clip(tmp_path / "clip.mp4", fps=8, num_frames=4, start=0)) == [0, 1, 2, 3]


def test_a_missing_file_and_a_file_without_pictures(tmp_path):
    with pytest.raises(UnreadableClip, match="no such file"):
        read_clip(tmp_path / "gone.mp4", fps=8, num_frames=4)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        silence.rate = 8000
        container.mux(stream.encode(silence))
    with pytest.raises(UnreadableClip, match="it has no video stream"):
        read_clip(tmp_path / "sound.wav", fps=8, num_frames=4)


def test_a_title_in_another_encoding_is_no_matter(tmp_path):
    encode(tmp_path / "clip.avi", grey_steps(8), bframes=0, title="caXe!")
    data = (tmp_path / "clip.avi").read_bytes()
    (tmp_path / "latin.avi").write_bytes(data.replace(b"caXe!", b"caf\xe9!"))
    assert (tmp_path / "latin.avi").read_bytes() != data
    plain, latin = (read_clip(tmp_path / f"{name}.avi", fps=10, num_frames=8, start=0) for name in ("clip", "latin"))
    assert np.array_equal(plain, latin)


def test_a_codec_that_nobody_knows_is_named(tmp_path):
    encode(tmp_path / "clip.mp4", grey_steps(8))
    data = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(data.replace(b"avc1", b"zzzz"))
    for read in (lambda path: read_clip(path, fps=10, num_frames=8), video.scan):
        with pytest.raises(UnreadableClip, match="there is no decoder for its codec"):
            read(tmp_path / "clip.mp4")


def test_a_packet_that_shows_nothing_is_no_frame_that_is_missing(tmp_path):
    """Of VP8, whose frames to refer to lie in packets of their own; here a hidden copy goes before every frame."""
    encode(tmp_path / "plain.webm", grey_steps(8), codec="libvpx")
    with av.open(str(tmp_path / "plain.webm")) as plain, av.open(str(tmp_path / "hidden.webm"), "w") as hidden:
        stream = hidden.add_stream_from_template(plain.streams.video[0])
        for packet in plain.demux(video=0):
            if packet.size:
                data = bytes(packet)
                for first, later in ((data[0] & ~0x10, 0), (data[0], 1)):
                    copy = av.Packet(bytes([first]) + data[1:])
                    copy.pts = copy.dts = packet.pts + later
                    copy.stream, copy.time_base, copy.is_keyframe = stream, packet.time_base, packet.is_keyframe
                    hidden.mux(copy)
    for name in ("plain", "hidden"):
        found = video.scan(tmp_path / f"{name}.webm")
        assert (len(found.times), found.num_listed, found.error) == (8, 8, ""), name


def test_libav_does_not_speak_for_itself(clips_dir):
    """In a process of its own, since pytest would catch what goes through logging."""
    code = "import sys; from vdm.data.video import read_clip; read_clip(sys.argv[1], fps=10, num_frames=16, start=1)"
    path = clips_dir / "broken" / "corrupted_tail.mp4"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, cwd=Path(__file__).parents[2], check=True
    )
    assert (done.stdout, done.stderr) == (b"", b"")


def test_a_stream_without_stamps_goes_by_its_frame_rate(tmp_path):
    encode(tmp_path / "bare.h264", grey_steps(20), bframes=0)
    clip = read_clip(tmp_path / "bare.h264", fps=100, num_frames=200, start=0)
    assert list(dict.fromkeys(numbers(clip))) == list(range(20))


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", ".mp4"), ("libvpx-vp9", ".webm")])
@pytest.mark.parametrize("colour_range", [ColorRange.MPEG, ColorRange.JPEG])
def test_the_range_of_levels_is_that_of_the_file(tmp_path, codec, suffix, colour_range):
    """16 to 235, or 0 to 255; H.264 says so in the pixel format, VP9 in the frame alone."""
    frames = grey_steps(4, step=60)
    encode(tmp_path / f"clip{suffix}", frames, codec=codec, colour_range=colour_range)
    back = read_clip(tmp_path / f"clip{suffix}", fps=10, num_frames=4)
    assert np.abs(back.astype(int) - frames).max() <= 3


def test_hidden_frames_that_the_container_lists_shift_nothing(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", grey_steps(20), fps=10)
    packets, true_times = listed(tmp_path / "clip.mp4")
    more = np.sort(np.append(true_times, [0.05, 0.25]))
    demuxed = video._demuxed
    monkeypatch.setattr(video, "_demuxed", lambda *opened: (demuxed(*opened)[0], more))
    for start, first in ((0, 0), (0.5, 7), (1, 14)):
        clip = read_clip(tmp_path / "clip.mp4", fps=10, num_frames=6, start=start)
        assert numbers(clip) == list(range(first, first + 6))


def test_files_are_closed(tmp_path, clips_dir):
    write_video(tmp_path / "clip.mp4", grey_steps(4), fps=8)
    (tmp_path / "bad.mp4").write_bytes(b"bad")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        read_clip(tmp_path / "clip.mp4", fps=8, num_frames=2)
        read_clip(clips_dir / "broken" / "corrupted_tail.mp4", fps=8, num_frames=16, start=1)
        with pytest.raises(UserError):
            read_clip(tmp_path / "bad.mp4", fps=8, num_frames=2)
    assert len(os.listdir("/proc/self/fd")) == before


# --- writing ---


def test_the_mp4_is_what_a_browser_plays(tmp_path):
    write_video(tmp_path / "clip.mp4", moving_picture(24), fps=12)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height, stream.frames, stream.average_rate) == (96, 64, 24, 12)
        assert stream.codec_context.colorspace == stream.codec_context.color_primaries == video.BT709
        assert stream.codec_context.color_trc == video.BT709 and stream.codec_context.color_range == 1
    content = (tmp_path / "clip.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")  # playable while it loads


@pytest.mark.parametrize(("height", "width"), [(33, 47), (33, 48), (32, 47), (1, 1)])
def test_odd_sizes_are_padded_by_the_edge(tmp_path, height, width):
    frames = moving_picture(3, height=height, width=width)
    write_video(tmp_path / "clip.mp4", frames, fps=8)
    back = read_clip(tmp_path / "clip.mp4", fps=8, num_frames=3)
    assert back.shape == (3, height + height % 2, width + width % 2, 3)
    assert psnr(back[:, :height, :width], frames) > 30


def test_the_same_frames_give_the_same_bytes_and_nothing_else_is_left(tmp_path):
    frames = moving_picture()
    for name in ("a.mp4", "b.mp4", "a.mp4"):
        write_video(tmp_path / "new" / "folder" / name, frames, fps=8)
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["a.mp4", "b.mp4"]
    a, b = ((tmp_path / "new" / "folder" / name).read_bytes() for name in ("a.mp4", "b.mp4"))
    assert a == b


def test_a_failure_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    encoded, to_yuv = [], video.to_yuv

    def fail_at_the_third(pixels):
        encoded.append(pixels)
        if len(encoded) == 3:
            raise RuntimeError("power cut")
        return to_yuv(pixels)

    monkeypatch.setattr(video, "to_yuv", fail_at_the_third)
    with pytest.raises(RuntimeError, match="power cut"):
        write_video(path, moving_picture(), fps=8)
    assert os.listdir(tmp_path) == ["clip.mp4"] and path.read_bytes() == b"old"


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cannot write .*clip\.mp4: .*file is not a folder; choose a folder"):
        write_video(tmp_path / "file" / "clip.mp4", moving_picture(2), fps=8)
    with pytest.raises(UserError, match=r"cannot write .*sheet\.png"):
        contact_sheet(tmp_path / "file" / "sheet.png", [moving_picture(2)], captions=["x"])
    (tmp_path / "taken.mp4").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*taken\.mp4"):
        write_video(tmp_path / "taken.mp4", moving_picture(2), fps=8)
    assert sorted(os.listdir(tmp_path)) == ["file", "taken.mp4"]
    with pytest.raises(UserError, match="at least one frame"):
        write_video(tmp_path / "clip.mp4", moving_picture(2)[:0], fps=8)


# --- uint8 <-> float ---


def test_float_and_back_is_exact_for_every_level():
    frames = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1).repeat(3, axis=3)
    clip = to_float(to_video(frames))
    assert clip.shape == (3, 2, 8, 16) and clip.dtype == torch.float32 and clip.is_contiguous()
    assert clip.min() == -1 and clip.max() == 1
    np.testing.assert_array_equal(to_uint8(clip), frames)


@given(st.floats(-3, 3, width=32))
def test_to_uint8_rounds_and_clamps(value):
    pixel = to_uint8(torch.full((3, 1, 1, 1), value))
    exact = float(np.clip((np.float64(value) + 1) * 127.5, 0, 255))
    assert pixel.shape == (1, 1, 1, 3) and pixel.dtype == np.uint8
    assert abs(int(pixel[0, 0, 0, 0]) - exact) <= 0.5 + 1e-4


def test_to_float_keeps_the_axes():
    frames = np.zeros((2, 3, 4, 3), dtype=np.uint8)
    frames[1, 2, 3, 0] = 255
    clip = to_float(to_video(frames))
    assert clip[0, 1, 2, 3] == 1 and (clip == 1).sum() == 1


# --- contact sheet ---


def test_the_contact_sheet_has_a_row_and_a_caption_for_each_clip(tmp_path):
    clips = [grey_steps(16, height=64, width=64), grey_steps(5, height=48, width=40)]
    contact_sheet(tmp_path / "sheet.png", clips, captions=["pushing a ball", "a very long caption " * 20])
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert os.listdir(tmp_path) == ["sheet.png"]
    assert sheet.shape[1] == 8 * 64
    shown = [int(sheet[32, 32 + 64 * column, 0]) for column in range(8)]
    assert shown == [20 + 6 * index for index in np.linspace(0, 15, 8).round().astype(int)]
    band = sheet[64 : 64 + 18]
    assert (band < 100).any() and (sheet[70 + 18 :, 8 * 40 :][:40] == 255).all()
    assert sheet.shape[0] > 64 + 48 + 4 * 18  # the long caption took several lines


def test_captions_outside_ascii_are_drawn_all_the_same(tmp_path):
    contact_sheet(tmp_path / "sheet.png", [grey_steps(1)], captions=["caf\u00e9 \u4f60"], columns_frames=3)
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[1] == 3 * 48


@pytest.mark.parametrize("start", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("crop", [None, Crop(16, 16)])
def test_a_clip_whose_colours_cannot_be_told_is_unreadable(tmp_path, start, crop):
    """YCgCo, which libav does not convert: wherever the window begins, not a byte is made up."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options=video.X264)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.colorspace = 8
        for pixels in grey_steps(12):
            frame = VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.colorspace = 8
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UnreadableClip, match=r"its colours \(yuv420p\) cannot be told"):
        read_clip(path, fps=10, num_frames=3, start=start, crop=crop)


def test_a_file_too_large_to_hold_is_read_twice(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", grey_steps(20), fps=10)
    at_once = read_clip(tmp_path / "clip.mp4", fps=10, num_frames=6, start=0.4)
    monkeypatch.setattr(video, "MAX_HELD", 100)
    assert listed(tmp_path / "clip.mp4")[0] is None
    np.testing.assert_array_equal(read_clip(tmp_path / "clip.mp4", fps=10, num_frames=6, start=0.4), at_once)
