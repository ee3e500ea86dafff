"""The only border between files and pixels: PyAV reads every clip and writes every mp4.

Frames are uint8 (T,H,W,3) RGB, as shown: rotation metadata is applied, the pixel aspect ratio is not. PyAV keeps
libav's own messages off stderr; what matters of them reaches the user in one sentence of ours.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
import numpy.typing as npt
import torch
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream
from torch import Tensor

from vdm.data.clips import duration, frame_indices
from vdm.data.colour import to_rgb, to_yuv, without_reserved
from vdm.data.packed import File, Packed
from vdm.data.transforms import Crop, Frames
from vdm.errors import UserError
from vdm.files import in_words, replacing

ShortPolicy = Literal["hold", "loop", "drop"]

Indices = npt.NDArray[np.int64]
Times = npt.NDArray[np.float64]  # seconds, ascending
ALL: Indices = np.empty(0, dtype=np.int64)  # to see every frame and keep none

BT709 = 1  # ITU-T H.273 code point, the same for primaries, transfer and matrix
# Without mbtree: at widths below 128 its look-ahead makes other bytes on each run, of the same frames in one thread.
X264 = {"crf": "17", "preset": "medium", "x264-params": "mbtree=0"}
MAX_HELD = 64 << 20  # bytes of a file held at once; more is read twice
SAME = 0.1  # mean difference of grey levels below which two frames show one picture: what a codec adds to a still


class UnreadableClip(UserError):
    """A file that gives no frame; `reason` is what the sentence says after its name."""

    def __init__(self, path: File, reason: str) -> None:
        super().__init__(f"{path} cannot be read: {reason}")
        self.path = Path(str(path))
        self.reason = reason


class ShortClip(UserError):
    """A file that is shorter than what is asked of it, where such are to be dropped."""


# --- file -> pixels ---


def read_clip(
    path: File,
    *,
    fps: float,
    num_frames: int,
    start: float = 0.5,
    short: ShortPolicy = "hold",
    crop: Crop | None = None,
    longest: int | None = None,
) -> Frames:
    """uint8 (num_frames,H,W,3): what is shown at `num_frames` moments 1/fps seconds apart (see `clips.frame_indices`).

    `start` in [0, 1] places the window in a longer file; a shorter one holds its last frame, loops, or raises ShortClip
    ("drop"). Frames have the file's own size, or are brought to that of `crop`. A file whose end is damaged gives what
    decodes before the damage. Raises UnreadableClip (a UserError) naming the file when no frame decodes.
    """
    window = Window(fps, num_frames, start, short, longest)
    return read_window(path, window, crop)[0]


@dataclass(frozen=True)
class Window:
    """Which moments of a file are wanted; the arguments of `read_clip`, and which one of them `only`, if not all."""

    fps: float
    num_frames: int
    start: float = 0.5
    short: ShortPolicy = "hold"
    longest: int | None = None
    only: int | None = None

    def indices(self, path: File, times: Times) -> Indices:
        """Of the frames (num_frames,), or (1,), of a file whose frames are shown at `times`. Raises ShortClip."""
        seconds = (self.num_frames - 1) / self.fps
        if self.short == "drop" and duration(times) < seconds:
            asked = f"{self.num_frames} frames at {self.fps:g} fps"
            raise ShortClip(f"{path} lasts {duration(times):.2f} seconds, and {asked} more")
        indices = frame_indices(
            times,
            fps=self.fps,
            num_frames=self.num_frames,
            start_fraction=self.start,
            loop=self.short == "loop",
            longest=self.longest,
        )
        return indices if self.only is None else indices[self.only : self.only + 1]


def read_window(path: File, window: Window, crop: Crop | None) -> tuple[Frames, Times]:
    """`read_clip`, and the seconds (N,) at which the frames of the file are shown."""
    path = _loaded(path)
    with _opened(path) as (container, stream):
        packets, times = _demuxed(container, stream)
        if len(times) == 0:
            raise UnreadableClip(path, "it holds no video frame")
        wanted = window.indices(path, times)
        if packets is not None:
            frames, seen = _decoded(path, packets, stream, wanted, crop)
    if packets is None:
        frames, seen = _decode(path, wanted, crop)
    if len(seen) <= wanted.max() or not np.array_equal(seen, times[: len(seen)]):
        # The codec shows other frames than the container lists (hidden or damaged ones): believe the codec.
        times = _decode(path, ALL)[1]
        wanted = window.indices(path, times)
        frames, seen = _decode(path, wanted, crop)
        if len(seen) <= wanted.max():
            raise UnreadableClip(path, "each time other frames of it decode")
    return frames, times


def _demuxed(container: InputContainer, stream: VideoStream) -> tuple[list[Packet] | None, Times]:
    """The packets of a file, unless they are too much to hold, and the seconds (N,) at which the container says that
    its frames are shown."""
    packets: list[Packet] | None = []
    stamps: list[int | None] = []
    held = 0
    try:
        for packet in container.demux(stream):
            held += packet.size
            if packets is not None:
                packets.append(packet)
            if held > MAX_HELD:
                packets = None
            if packet.size and not packet.is_discard:
                stamps.append(packet.pts)
    except av.FFmpegError:
        pass  # a damaged end: the packets before it stand
    return packets, _display_times(stamps, stream)


def _decode(path: File, wanted: Indices, crop: Crop | None = None) -> tuple[Frames, Times]:
    """`_decoded` of a whole file."""
    with _opened(path) as (container, stream):
        return _decoded(path, container.demux(stream), stream, wanted, crop)


def _decoded(
    path: File, packets: Iterable[Packet], stream: VideoStream, wanted: Indices, crop: Crop | None
) -> tuple[Frames, Times]:
    """One decoding pass: the frames `wanted` (N,), by their place in display order, and the seconds of all frames seen.

    Frames leave the decoder in display order whatever their stamps say. The pass ends with the last frame wanted, or
    sees all where none is; it also ends where the file is damaged, and what was wanted beyond is undefined. Raises
    UnreadableClip when it sees no frame.
    """
    last = wanted.max(initial=-1)
    places: dict[int, list[int]] = {}  # in the clip, of each frame wanted
    for place, index in enumerate(wanted.tolist()):
        places.setdefault(index, []).append(place)
    pictures = np.empty((len(wanted), crop.height, crop.width, 3) if crop else (0, 0, 0, 3), dtype=np.uint8)
    stamps: list[int | None] = []
    size = 0, 0  # of the first frame; a stream may change its size on the way
    reason = "no frame of it decodes"
    try:
        for frame in _frames(packets):
            if not stamps:
                size = frame.width, frame.height
            if here := places.get(len(stamps)):
                picture = _shown(path, frame, crop, size, pictures[here[0]] if pictures.size else None)
                if not pictures.size:
                    pictures = np.empty((len(wanted), *picture.shape), dtype=np.uint8)
                    pictures[here[0]] = picture
                pictures[here[1:]] = picture
            stamps.append(frame.pts)
            if len(stamps) > last >= 0:
                break
    except av.FFmpegError as error:
        reason = in_words(error)
    if not stamps:
        raise UnreadableClip(path, reason)
    return pictures, _display_times(stamps, stream)


def _shown(path: File, frame: VideoFrame, crop: Crop | None, size: tuple[int, int], out: Frames | None) -> Frames:
    """`to_rgb`; a frame that has no RGB makes its file unreadable, for all others are alike."""
    try:
        return to_rgb(frame, crop, size=size, out=out)
    except (av.FFmpegError, cv2.error, ValueError) as error:
        raise UnreadableClip(path, f"its colours ({frame.format.name}) cannot be told: {in_words(error)}") from error


def _frames(packets: Iterable[Packet]) -> Iterator[VideoFrame]:
    for packet in packets:
        for frame in packet.decode():
            assert isinstance(frame, VideoFrame)
            yield frame


@dataclass(frozen=True)
class Scan:
    """What one pass over a whole file finds."""

    times: Times  # (N,) seconds of the frames that decode, ascending
    width: int  # as shown, after rotation
    height: int
    rotation: int  # degrees, 0 to 270 counterclockwise
    num_listed: int  # frames that the container holds
    num_same: int  # frames that show what the frame before does
    error: str  # why decoding ended early; "" if it did not


def scan(path: File) -> Scan:
    """Decode every frame of a file, holding one. Raises UnreadableClip when none decodes."""
    stamps: list[int | None] = []
    listed = same = rotation = 0
    size, last, error = (0, 0), None, ""
    with _opened(path) as (container, stream):
        try:
            for packet in container.demux(stream):
                listed += _shows(packet, stream)
                for frame in packet.decode():
                    assert isinstance(frame, VideoFrame)
                    if not stamps:
                        size, rotation = (frame.width, frame.height), round(frame.rotation / 90) % 4
                    without_reserved(frame)
                    grey = frame.to_ndarray(format="gray", threads=1)
                    if last is not None and grey.shape == last.shape:  # a stream may change its size on the way
                        same += float(cv2.absdiff(grey, last).mean()) < SAME
                    last = grey
                    stamps.append(frame.pts)
        except av.FFmpegError as problem:
            error = in_words(problem)
            with suppress(av.FFmpegError):  # what the container holds besides
                listed += sum(_shows(packet, stream) for packet in container.demux(stream))
        if not stamps:
            raise UnreadableClip(path, error or ("no frame of it decodes" if listed else "it holds no video frame"))
        width, height = size if rotation % 2 == 0 else size[::-1]
        return Scan(_display_times(stamps, stream), width, height, 90 * rotation, listed, same, error)


def _shows(packet: Packet, stream: VideoStream) -> bool:
    """Whether a frame is to come of a packet. VP8 stores what others refer to as packets of their own, which its
    containers do not mark, but the codec does (RFC 6386, section 9.1)."""
    if not packet.size or packet.is_discard:
        return False
    return stream.codec_context.name != "vp8" or bool(bytes(packet)[0] & 0x10)


@contextmanager
def _opened(path: File) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream, set to decode in this thread alone; closed on the way out."""
    path = _loaded(path)
    try:
        file = io.BytesIO(path.data or b"") if isinstance(path, Packed) else str(path)
        container = av.open(file, "r", metadata_errors="replace")  # a title in another encoding is no matter
    except (av.FFmpegError, OSError) as error:
        raise UnreadableClip(path, in_words(error)) from error
    with container:
        if not container.streams.video:
            raise UnreadableClip(path, "it has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise UnreadableClip(path, "there is no decoder for its codec")
        stream.thread_type = "NONE"  # workers are the parallelism; threads inside each would only fight over the cores
        stream.codec_context.thread_count = 1
        yield container, stream


def _loaded(path: File) -> File:
    """A file inside another is read once, for there are several passes over it."""
    try:
        return path.loaded() if isinstance(path, Packed) else path
    except (OSError, ValueError) as error:
        raise UnreadableClip(path, in_words(error)) from error


def _display_times(stamps: Sequence[int | None], stream: VideoStream) -> Times:
    """Seconds, ascending: sorting undoes the order of storage (B-frames) and stamps that run backwards (some AVI)."""
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) < len(stamps) or stream.time_base is None:
        return np.arange(len(stamps)) / float(stream.average_rate or stream.guessed_rate or 25)
    return np.sort(np.array(known, dtype=np.float64)) * float(stream.time_base)


# --- pixels -> file ---


def write_video(path: str | Path, frames: Frames, *, fps: float) -> None:
    """Write uint8 (T,H,W,3) as H.264 yuv420p mp4 that a browser plays; odd sizes are made even by repeating the edge.

    The same frames give the same bytes. The file appears whole or not at all. Raises UserError when the folder cannot
    be written.
    """
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3, "uint8 (T,H,W,3)"
    if len(frames) == 0:
        raise UserError(f"cannot write {path}: a video needs at least one frame")
    with replacing(Path(path)) as temporary:
        _encode(temporary, frames, fps=fps)


def _encode(path: Path, frames: Frames, *, fps: float) -> None:
    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as mp4:
        rate = Fraction(fps).limit_denominator(1001)
        stream = mp4.add_stream("libx264", rate=rate, options=X264)
        stream.height, stream.width, stream.pix_fmt = even.shape[1], even.shape[2], "yuv420p"
        context = stream.codec_context
        context.thread_count = 1  # slices per thread would make the bytes depend on the machine
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = ColorRange.MPEG
        for pixels in even:
            mp4.mux(stream.encode(to_yuv(pixels)))
        mp4.mux(stream.encode(None))


# --- uint8 <-> float ---


def to_video(frames: Frames) -> Tensor:
    """uint8 (T,H,W,3) as a video uint8 (3,T,H,W) of the same memory."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)


def to_float(video: Tensor) -> Tensor:
    """uint8 (...,3,T,H,W) -> float32 (...,3,T,H,W) in [-1,1], contiguous."""
    return video.contiguous().float().div_(127.5).sub_(1.0)


def to_uint8(video: Tensor) -> Frames:
    """float (3,T,H,W) in [-1,1] -> uint8 (T,H,W,3); rounded to the nearest step, what lies outside is clamped."""
    pixels = video.detach().float().add(1.0).mul(127.5).round().clamp(0, 255)
    return np.ascontiguousarray(pixels.to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy())
