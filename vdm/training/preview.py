"""A preview on disk: mp4 files, one contact sheet, and what each clip was to show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from vdm import dist
from vdm.data.sheet import contact_sheet
from vdm.data.video import to_uint8, write_video
from vdm.files import replacing

SHEET, CAPTIONS = "contact_sheet.png", "captions.json"


def write_preview(folder: Path, video: Tensor, *, captions: Sequence[str], fps: float) -> None:
    """Clips (B,3,T,H,W) in [-1,1] as `00.mp4`, `01.mp4` ..., a contact sheet, and a list of their captions; by one
    process for all."""
    if not dist.is_main():
        return
    clips = [to_uint8(clip) for clip in video]
    for number, clip in enumerate(clips):
        write_video(folder / f"{number:02d}.mp4", clip, fps=fps)
    contact_sheet(folder / SHEET, clips, captions=list(captions))
    with replacing(folder / CAPTIONS) as file:
        file.write_text(json.dumps(list(captions)) + "\n", encoding="utf-8")
