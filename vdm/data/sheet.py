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
    path: str | Path, clips: Sequence[Frames], *, captions: Sequence[str], columns_frames: int = 8
) -> None:
    """Write a PNG with one row per clip uint8 (T,H,W,3): frames evenly spaced in time, the caption beneath.

    Rows are padded with white to a common width. Raises UserError when the folder cannot be written.
    """
    assert clips and len(clips) == len(captions), "one caption for each clip, at least one clip"
    strips = [_strip(clip, columns_frames) for clip in clips]
    width = max(strip.shape[1] for strip in strips)
    rows: list[Frames] = []
    for strip, caption in zip(strips, captions, strict=True):
        rows.append(np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255))
        rows.append(_text_band(caption, width))
    done, png = cv2.imencode(".png", cv2.cvtColor(np.concatenate(rows), cv2.COLOR_RGB2BGR))
    assert done
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(png.tobytes())


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
