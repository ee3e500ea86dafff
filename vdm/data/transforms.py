"""Any frame size to the one a model wants: shrink or enlarge until it covers, then crop. And a clip's other looks."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]  # (T, H, W, 3) RGB
Picture = npt.NDArray[np.uint8]  # (H, W) or (H, W, 3)


@dataclass(frozen=True)
class Crop:
    """The size that is wanted, and which part of a picture: the largest of its shape, placed by `x` and `y` in [0, 1],
    where 0 is left and top, 0.5 the centre."""

    height: int
    width: int
    x: float = 0.5
    y: float = 0.5

    def part(self, old_width: int, old_height: int) -> tuple[int, int, int, int]:
        """Left, top, width and height of it. Left and top are even, for in video two by two pixels share a colour."""
        scale = max(self.height / old_height, self.width / old_width)
        width, height = (
            max(1, min(old, round(new / scale))) for old, new in ((old_width, self.width), (old_height, self.height))
        )
        return _even(old_width - width, self.x), _even(old_height - height, self.y), width, height


def _even(slack: int, fraction: float) -> int:
    return min(2 * round(slack * fraction / 2), slack // 2 * 2)


def resize(picture: Picture, width: int, height: int) -> Picture:
    """uint8 (H,W) or (H,W,3). Shrinking averages areas, since sampling points of a large frame would flicker; enlarging
    interpolates linearly."""
    old_height, old_width = picture.shape[:2]
    if (width, height) == (old_width, old_height):
        return picture
    method = cv2.INTER_AREA if width * height < old_width * old_height else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(picture, (width, height), interpolation=method), dtype=np.uint8)


def resize_crop(frames: Frames, crop: Crop) -> Frames:
    """uint8 (T,H,W,3) -> uint8 (T,height,width,3), contiguous; the aspect ratio is kept, what hangs over is cut off."""
    left, top, width, height = crop.part(frames.shape[2], frames.shape[1])
    out = np.empty((len(frames), crop.height, crop.width, 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        out[index] = resize(frame[top : top + height, left : left + width], crop.width, crop.height)
    return out


def flip(frames: Frames) -> None:
    """Make a clip (T,H,W,3) its mirror image, in place; `mirror.mirrored` says what becomes of words."""
    for frame in frames:
        frame[...] = cv2.flip(frame, 1)


def jitter(frames: Frames, *, brightness: float, contrast: float, saturation: float) -> None:
    """Give a clip (T,H,W,3) other light, in place: each a factor, 1 for no change, the same for all frames.

    Contrast is about the clip's own mean, saturation about each pixel's grey. There is no change of hue, for captions
    name colours.
    """
    mean = float(np.mean(cv2.mean(frames.reshape(-1, *frames.shape[2:]))[:3])) * brightness
    mixed = saturation * np.eye(3) + (1 - saturation) * np.array([[0.299, 0.587, 0.114]] * 3)
    offset = np.full((3, 1), mean * (1 - contrast))
    matrix = np.concatenate([brightness * contrast * mixed, offset], axis=1)
    for frame in frames:
        frame[...] = cv2.transform(frame, matrix)
