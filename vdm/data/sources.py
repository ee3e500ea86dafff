"""Where clips come from: files, or the mini-something renderer. Both are a finite, numbered set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vdm.data.clips import duration
from vdm.data.mini_something import Rendered, render_clip
from vdm.data.packed import Packed
from vdm.data.ssv2 import ClipFile
from vdm.data.transforms import Crop, Frames
from vdm.data.video import ShortPolicy, Window, read_window


@dataclass(frozen=True)
class Cut:
    """Which part of a clip is taken: its length, and where in time and in the picture (fractions in [0,1]).

    `only` is the number of the one of these frames that is wanted, as an image; None is all.
    """

    num_frames: int
    start: float = 0.5
    x: float = 0.5
    y: float = 0.5
    only: int | None = None


@dataclass(frozen=True)
class Words:
    """What is said of a clip; template and placeholders are SSv2's, and empty where there are none."""

    caption: str
    template: str = ""
    placeholders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A clip as it was cut, what is said of it, and how long it goes on."""

    frames: Frames  # uint8 (T,height,width,3)
    words: Words
    elapsed: float  # seconds from the file's first frame to its last
    duration: float  # and to the end of that


class Source(Protocol):
    """Clips of one size and frame rate, numbered from 0."""

    def __len__(self) -> int: ...

    def id(self, index: int) -> str: ...

    def caption(self, index: int) -> str: ...

    def words(self, index: int) -> Words: ...

    def num_bytes(self, index: int) -> int:
        """Of the clip's file; 0 where there is none."""
        ...

    def load(self, index: int, cut: Cut) -> Loaded:
        """A clip; raises UnreadableClip, or ShortClip where short ones are dropped."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Clips in files."""

    clips: list[ClipFile]
    height: int
    width: int
    fps: float
    longest: int
    short: ShortPolicy = "hold"

    def __len__(self) -> int:
        return len(self.clips)

    def id(self, index: int) -> str:
        return self.clips[index].id

    def caption(self, index: int) -> str:
        return self.clips[index].caption

    def num_bytes(self, index: int) -> int:
        path = self.clips[index].path
        if isinstance(path, Packed):
            return path.size
        try:
            return path.stat().st_size
        except OSError:  # which will be named when it is read
            return 0

    def words(self, index: int) -> Words:
        clip = self.clips[index]
        return Words(clip.caption, clip.template, clip.placeholders)

    def load(self, index: int, cut: Cut) -> Loaded:
        window = Window(self.fps, cut.num_frames, cut.start, self.short, self.longest, cut.only)
        frames, times = read_window(self.clips[index].path, window, Crop(self.height, self.width, cut.x, cut.y))
        return Loaded(frames, self.words(index), float(times[-1] - times[0]), duration(times))


@dataclass(frozen=True)
class RenderedSource:
    """mini-something's clips `first` ... `first + num_clips - 1`, drawn when asked for: nothing is cut away."""

    num_clips: int
    first: int
    seed: int
    height: int
    width: int
    fps: float

    def __len__(self) -> int:
        return self.num_clips

    def id(self, index: int) -> str:
        return str(self.first + index)

    def caption(self, index: int) -> str:
        return self.words(index).caption

    def num_bytes(self, index: int) -> int:
        return 0

    def words(self, index: int) -> Words:
        return _words(self._render(index, height=16, width=16, num_frames=1))  # they do not depend on the size

    def load(self, index: int, cut: Cut) -> Loaded:
        clip = self._render(index, height=self.height, width=self.width, num_frames=cut.num_frames)
        frames = clip.frames if cut.only is None else clip.frames[cut.only : cut.only + 1]
        return Loaded(frames, _words(clip), (cut.num_frames - 1) / self.fps, cut.num_frames / self.fps)

    def _render(self, index: int, *, height: int, width: int, num_frames: int) -> Rendered:
        index += self.first
        return render_clip(index, seed=self.seed, height=height, width=width, num_frames=num_frames, fps=self.fps)


def _words(clip: Rendered) -> Words:
    return Words(clip.label, clip.template, clip.placeholders)
