"""`vdm data view`: one page with the very clips, frames and captions that a model will see, playable in a browser."""

from __future__ import annotations

import base64
import html
import tempfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from vdm import webpage
from vdm.data.dataset import ClipDataset
from vdm.data.find import guess_format
from vdm.data.loader import Batch, batches
from vdm.data.settings import DataConfig
from vdm.data.transforms import Frames
from vdm.data.video import write_video

STRIP_HEIGHT = 64  # pixels of the frames beneath a clip


def write_page(config: DataConfig, output: Path, *, num_clips: int, seed: int, batch_size: int) -> int:
    """Write the first `num_clips` training clips of a run with this data section and seed; returns how many.

    `batch_size` is how many clips a step of the run has, which share a length.
    The file appears whole or not at all. Raises UserError.
    """
    clips = ClipDataset(config, split="train", seed=seed, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        stream = batches(clips, batch_size=1, num_batches=num_clips, num_workers=max(1, config.dataloader_num_workers))
        figures = [
            _figure(batch, config.fps, Path(folder) / "clip.mp4")
            for batch in tqdm(stream, total=num_clips, desc="drawing", unit="clip")
        ]
    title = f"{config.root or config.format}: {num_clips} clips as the model sees them"
    changed = [
        f"{name} {value}" for name, value in vars(config).items() if value != getattr(DataConfig(), name) and value
    ]  # fmt: skip
    body = (
        f"<h1>{html.escape(title)}</h1>\n<p>{len(clips)} clips to train on, seed {seed}; "
        f"{html.escape(', '.join(changed))}</p>\n<main>\n{''.join(figures)}</main>"
    )
    webpage.write_page(output, title, body, remedy="choose another --output")
    return num_clips


def _figure(batch: Batch, fps: float, file: Path) -> str:
    frames = batch.video[0].permute(1, 2, 3, 0).numpy()
    write_video(file, frames, fps=fps)
    video = webpage.video(file.read_bytes(), "controls loop")
    length, height, width = frames.shape[:3]
    about = f"clip {batch.ids[0]}, position {batch.positions[0]}: {length} frames of {width}x{height} at {fps:g} fps"
    left_out = "".join(f"<br>in place of {html.escape(f'{name}: {reason}')}" for name, reason in batch.bad)
    return (
        f"<figure>\n{video}\n"
        f'<div class="strip"><img alt="its frames" src="data:image/jpeg;base64,{_strip(frames)}"></div>\n'
        f"<figcaption><b>{html.escape(batch.captions[0])}</b><small>{html.escape(about)}{left_out}</small></figcaption>\n"
        "</figure>\n"
    )


def _strip(frames: Frames) -> str:
    """All frames side by side, as JPEG in base64."""
    length, height, width = frames.shape[:3]
    small = [cv2.resize(frame, (max(1, width * STRIP_HEIGHT // height), STRIP_HEIGHT)) for frame in frames]
    done, jpeg = cv2.imencode(".jpg", cv2.cvtColor(np.concatenate(small, axis=1), cv2.COLOR_RGB2BGR))
    assert done
    return base64.b64encode(jpeg.tobytes()).decode()


def with_root(config: DataConfig, root: Path | str) -> DataConfig:
    """A run's data section on the clips of another place."""
    guessed = guess_format(str(root))
    return replace(config, format=guessed.format, root=guessed.root)
