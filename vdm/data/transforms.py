"""Any frame size to the one a model wants: shrink or enlarge until it covers, then crop. And a clip's other looks."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]  # (T, H, W, 3) RGB


def resize_crop(frames: Frames, *, height: int, width: int, x: float = 0.5, y: float = 0.5) -> Frames:
    """uint8 (T,H,W,3) -> uint8 (T,height,width,3), contiguous; the aspect ratio is kept, what hangs over is cut off.

    `x` and `y` in [0, 1] place the crop in what hangs over: 0 is left and top, 0.5 the centre. Shrinking averages
    areas, since sampling points of a large frame would flicker; enlarging interpolates linearly.
    """
    old_height, old_width = frames.shape[1:3]
    scale = max(height / old_height, width / old_width)
    new_height = max(height, round(old_height * scale))
    new_width = max(width, round(old_width * scale))
    top = round((new_height - height) * y)
    left = round((new_width - width) * x)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    out = np.empty((len(frames), height, width, 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        if (new_height, new_width) != (old_height, old_width):
            frame = np.asarray(cv2.resize(frame, (new_width, new_height), interpolation=method), dtype=np.uint8)
        out[index] = frame[top : top + height, left : left + width]
    return out


def flip(frames: Frames) -> Frames:
    """The mirror image (T,H,W,3), contiguous; `mirror.mirrored` says what becomes of words."""
    return np.ascontiguousarray(frames[:, :, ::-1])


def jitter(frames: Frames, *, brightness: float, contrast: float, saturation: float) -> Frames:
    """Other light: each a factor, 1 for no change, and the same for all frames of a clip (T,H,W,3).

    Contrast is about the clip's own mean, saturation about each pixel's grey. There is no change of hue, for captions
    name colours.
    """
    mean = float(frames.mean()) * brightness
    levels = (np.arange(256) * brightness - mean) * contrast + mean
    table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    out = np.empty_like(frames)
    for index, frame in enumerate(frames):
        lit = cv2.LUT(frame, table)
        grey = cv2.cvtColor(cv2.cvtColor(lit, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        out[index] = cv2.addWeighted(lit, saturation, grey, 1.0 - saturation, 0.0)
    return out
