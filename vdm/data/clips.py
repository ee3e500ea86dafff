"""Which frames of a file make a clip: index arithmetic on time stamps, with no pixels and no files."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vdm.errors import UserError

# Containers round stamps to milliseconds, and a stamp is taken relative to the first one, itself rounded: a frame due
# exactly at the target time may carry a stamp up to one millisecond later, and must still count as shown.
STAMP_TOLERANCE = 1e-3 + 1e-9


def frame_indices(
    timestamps: npt.ArrayLike,
    *,
    fps: float,
    num_frames: int,
    start_fraction: float,
    loop: bool = False,
    longest: int | None = None,
) -> npt.NDArray[np.int64]:
    """Indices (num_frames,) of the frames shown at `num_frames` moments spaced 1/fps seconds.

    `timestamps` (N,) are seconds in display order, ascending, N >= 1; their spacing may vary and may start anywhere. A
    moment shows the last frame whose stamp is not after it, so a slower source repeats frames, a faster one skips some,
    and a clip shorter than the window holds its last frame, or begins again where it is to `loop`. `start_fraction` in
    [0, 1] places the window in the slack that a longer clip leaves: 0 begins with the first frame, 1 ends on the last.
    A window shorter than `longest` frames lies on the moments of the one of that length (see `window_offset`).
    """
    stamps = np.asarray(timestamps, dtype=np.float64)
    if not fps > 0 or num_frames < 1:
        raise UserError(f"a clip needs fps above 0 and at least 1 frame, got fps={fps} and num_frames={num_frames}")
    if not 0.0 <= start_fraction <= 1.0:
        raise UserError(f"the start of a clip must be a fraction between 0 and 1, got {start_fraction}")
    assert stamps.ndim == 1 and stamps.size > 0 and np.all(np.diff(stamps) >= 0), "stamps must ascend"
    elapsed = stamps - stamps[0]
    longest = max(num_frames, longest or 0)
    begin = start_fraction * _slack(elapsed[-1], fps, longest)
    offset = window_offset(elapsed[-1], fps=fps, num_frames=num_frames, longest=longest, start_fraction=start_fraction)
    moments = begin + (offset + np.arange(num_frames)) / fps
    if loop:
        moments %= (period := duration(stamps))
        moments[period - moments < STAMP_TOLERANCE] = 0.0  # a whole number of rounds, but for rounding
    return np.searchsorted(elapsed, moments + STAMP_TOLERANCE, side="right").astype(np.int64) - 1


def window_offset(elapsed: float, *, fps: float, num_frames: int, longest: int, start_fraction: float) -> int:
    """How many frames of the window of `longest` frames come before that of `num_frames` at the same start fraction.

    So that whoever has the longest window has all others, wherever in it they lie; a window begins up to 1/fps seconds
    before its exact place for that. `elapsed` is the seconds from the first frame of a file to its last.
    """
    first, last = (start_fraction * _slack(elapsed, fps, frames) for frames in (longest, num_frames))
    return int((last - first) * fps + 1e-6)


def _slack(elapsed: float, fps: float, num_frames: int) -> float:
    """Seconds by which a file outlasts a window."""
    return max(0.0, elapsed - (num_frames - 1) / fps)


def duration(timestamps: npt.ArrayLike) -> float:
    """Seconds from the first stamp (N,), ascending, to the end of the last frame, shown as long as the others are."""
    stamps = np.asarray(timestamps, dtype=np.float64)
    usual = float(np.median(np.diff(stamps))) if stamps.size > 1 else 0.0
    return float(stamps[-1] - stamps[0]) + (usual if usual > 0 else 1.0)
