"""Between a codec's planes of light and colour and RGB.

Nearly all video is yuv420p, and clips are wanted smaller than they are: there each plane is resized and cropped before
it becomes RGB, with the accuracy of bytes, which takes a quarter of the time of converting the picture first.
"""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace

from vdm.data.transforms import Crop, Frames, resize, resize_crop

# Red's and blue's share of light (ITU-T H.273, table 4), by code point; what says nothing is taken for BT.601.
LIGHT = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}
# libswscale's flags by number: PyAV 17, the last for Python 3.10, names only the ways to interpolate.
BILINEAR, BICUBIC, ACCURATE_RND, FULL_CHR_H_INT = 0x2, 0x4, 0x40000, 0x2000
ACCURATE = BICUBIC | ACCURATE_RND | FULL_CHR_H_INT
# For reading: of colour between its samples a tenth of a level from the above on average, in half the time. libav's
# default is another ten times as fast, and off by up to 60 levels at the edges of colours, which captions name.
RESERVED, UNSPECIFIED = (0, 3), 2
READING = BILINEAR | ACCURATE_RND | FULL_CHR_H_INT


def to_rgb(frame: VideoFrame, crop: Crop | None, *, size: tuple[int, int], out: Frames | None = None) -> Frames:
    """uint8 (H,W,3), turned as the frame's metadata asks; cropped, or else as large as `size` (width, height) says,
    before it is turned. It is `out` where that is given, of the final size."""
    turns = round(frame.rotation / 90) % 4  # both count counterclockwise
    if crop is not None and not turns and frame.format.name in ("yuv420p", "yuvj420p") and frame.colorspace in LIGHT:
        return _cropped(frame, crop, out)
    without_reserved(frame)
    rgb = frame.to_ndarray(width=size[0], height=size[1], format="rgb24", interpolation=READING, threads=1)
    picture = np.rot90(np.asarray(rgb, dtype=np.uint8), k=turns)
    picture = picture if crop is None else resize_crop(picture[None], crop)[0]
    if out is None:
        return picture
    out[...] = picture
    return out


def without_reserved(frame: VideoFrame) -> None:
    """Take out tags without a meaning (ITU-T H.273: 0 and 3), which files do have, and PyAV 17 refuses to convert."""
    if frame.color_primaries in RESERVED or frame.color_trc in RESERVED:
        frame.color_primaries = frame.color_trc = UNSPECIFIED


def _cropped(frame: VideoFrame, crop: Crop, out: Frames | None) -> Frames:
    """Light and colour brought to the final size each by itself. A sample of colour lies amid the four of light that
    it is for, and a row or column of odd length ends with half of one."""
    left, top, width, height = crop.part(frame.width, frame.height)
    planes = []
    for scale, plane in zip((1, 2, 2), frame.planes, strict=True):
        samples = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        rows, columns = -(-height // scale), -(-width // scale)
        part = samples[top // scale :, left // scale :][:rows, :columns]
        covered = resize(part, round(crop.width * columns * scale / width), round(crop.height * rows * scale / height))
        planes.append(covered[: crop.height, : crop.width])
    full = frame.color_range == ColorRange.JPEG or frame.format.name == "yuvj420p"
    return np.asarray(cv2.transform(cv2.merge(planes), _matrix(frame.colorspace, full), dst=out), dtype=np.uint8)


@cache
def _matrix(colorspace: int, full: bool) -> npt.NDArray[np.float32]:
    """(3,4), from (Y, Cb, Cr, 1) in bytes to RGB in bytes (ITU-T H.273, section 8.3)."""
    red, blue = LIGHT[colorspace]
    green = 1 - red - blue
    to_red, to_blue = 2 * (1 - red), 2 * (1 - blue)
    sums = np.array(
        [[1, 0, to_red], [1, -to_blue * blue / green, -to_red * red / green], [1, to_blue, 0]],
    ) * ([1, 1, 1] if full else [255 / 219, 255 / 224, 255 / 224])
    zero = sums @ [0 if full else 16, 128, 128]
    return np.concatenate([sums, -zero[:, None]], axis=1).astype(np.float32)


def to_yuv(pixels: Frames) -> VideoFrame:
    """uint8 (H,W,3) to yuv420p as BT.709 of limited range, which is what players assume."""
    return VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=ACCURATE,
        threads=1,
    )
