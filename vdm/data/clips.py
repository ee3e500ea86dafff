"""Which frames of a file make a clip: index arithmetic on time stamps, with no pixels and no files."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vdm.errors import UserError

# Containers round stamps to milliseconds, and a stamp is taken relative to the first one, itself rounded: a frame due
# exactly at the target time may carry a stamp up to one millisecond later, and must still count as shown.
STAMP_TOLERANCE = 1e-3 + 1e-9


def frame_indices(
    timestamps: npt.ArrayLike, *, fps: float, num_frames: int, start_fraction: float, loop: bool = False
) -> npt.NDArray[np.int64]:
    """Indices (num_frames,) of the frames shown at `num_frames` moments spaced 1/fps seconds.

    `timestamps` (N,) are seconds in display order, ascending, N >= 1; their spacing may vary and may start anywhere. A
    moment shows the last frame whose stamp is not after it, so a slower source repeats frames, a faster one skips some,
    and a clip shorter than the window holds its last frame, or begins again where it is to `loop`. `start_fraction` in
    [0, 1] places the window in the slack that a longer clip leaves: 0 begins with the first frame, 1 ends on the last.
    """
    stamps = np.asarray(timestamps, dtype=np.float64)
    if not fps > 0 or num_frames < 1:
        raise UserError(f"a clip needs fps above 0 and at least 1 frame, got fps={fps} and num_frames={num_frames}")
    if not 0.0 <= start_fraction <= 1.0:
        raise UserError(f"the start of a clip must be a fraction between 0 and 1, got {start_fraction}")
    assert stamps.ndim == 1 and stamps.size > 0 and np.all(np.diff(stamps) >= 0), "stamps must ascend"
    elapsed = stamps - stamps[0]
    slack = max(0.0, elapsed[-1] - (num_frames - 1) / fps)
    moments = start_fraction * slack + np.arange(num_frames) / fps
    if loop:
        moments %= (period := duration(stamps))
        moments[period - moments < STAMP_TOLERANCE] = 0.0  # a whole number of rounds, but for rounding
    return np.searchsorted(elapsed, moments + STAMP_TOLERANCE, side="right").astype(np.int64) - 1


def duration(timestamps: npt.ArrayLike) -> float:
    """Seconds from the first stamp (N,), ascending, to the end of the last frame, shown as long as the others are."""
    stamps = np.asarray(timestamps, dtype=np.float64)
    usual = float(np.median(np.diff(stamps))) if stamps.size > 1 else 0.0
    return float(stamps[-1] - stamps[0]) + (usual if usual > 0 else 1.0)
