"""Any frame size to the one a model wants: shrink or enlarge until it covers, then crop."""

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
