"""A picture of many clips: a row of frames each, and its caption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from vdm.data.transforms import Frames
from vdm.files import replacing

FONT = (cv2.FONT_HERSHEY_SIMPLEX, 0.45)
LINE_HEIGHT, MARGIN = 18, 5


def contact_sheet(
    path: str | Path, clips: Sequence[Frames], *, captions: Sequence[str], columns_frames: int = 8, across: int = 1
) -> None:
    """Write a PNG of clips uint8 (T,H,W,3), so many across: frames evenly spaced in time, the caption beneath.

    What is smaller is padded with white. Raises UserError when the folder cannot be written.
    """
    assert clips and len(clips) == len(captions), "one caption for each clip, at least one clip"
    strips = [_strip(clip, columns_frames) for clip in clips]
    width = max(strip.shape[1] for strip in strips)
    cells = [
        np.concatenate([_padded(strip, strip.shape[0], width), _text_band(caption, width)])
        for strip, caption in zip(strips, captions, strict=True)
    ]
    rows: list[Frames] = []
    for first in range(0, len(cells), across):
        row = cells[first : first + across]
        height = max(cell.shape[0] for cell in row)
        joined = np.concatenate([_padded(cell, height, width) for cell in row], axis=1)
        rows.append(_padded(joined, height, width * min(across, len(cells))))
    done, png = cv2.imencode(".png", cv2.cvtColor(np.concatenate(rows), cv2.COLOR_RGB2BGR))
    assert done
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(png.tobytes())


def _padded(picture: Frames, height: int, width: int) -> Frames:
    """White below and to the right."""
    missing = ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0))
    return np.pad(picture, missing, constant_values=255)


def _strip(clip: Frames, columns: int) -> Frames:
    """uint8 (H, columns*W, 3)."""
    chosen = np.linspace(0, len(clip) - 1, columns).round().astype(int)
    return np.concatenate(list(clip[chosen]), axis=1)


def _text_band(text: str, width: int) -> Frames:
    """Black on white uint8 (h,width,3), wrapped at words; OpenCV's fonts draw ASCII only."""
    lines = [""]
    for word in text.encode("ascii", "replace").decode().split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and cv2.getTextSize(longer, *FONT, 1)[0][0] > width - 2 * MARGIN:
            lines.append(word)
        else:
            lines[-1] = longer
    band = np.full((LINE_HEIGHT * len(lines) + MARGIN, width, 3), 255, dtype=np.uint8)
    for number, line in enumerate(lines, start=1):
        cv2.putText(band, line, (MARGIN, LINE_HEIGHT * number - MARGIN), *FONT, (0, 0, 0), 1, cv2.LINE_AA)
    return band
