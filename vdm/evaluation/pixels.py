"""Extractors that need no weights: how consecutive frames differ, how things move, and small pictures of a clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from vdm.data.transforms import Frames
from vdm.evaluation.clips import Shape
from vdm.evaluation.extract import Opened, Rows
from vdm.metrics.motion import (
    dynamic_degree,
    flicker,
    measure_flows,
    motion_smoothness,
    motion_smoothness_by_interpolation,
    warping_error,
)
from vdm.metrics.similarity import frame_ssim
from vdm.metrics.temporal import motion_energy

SMALL, MOMENTS = 8, 8  # pixels a side and frames of the pictures by which clips are found alike
FRAME_COLUMNS = ("frame_ssim", "flicker", "motion_energy")
FLOW_COLUMNS = (
    "ms_flow", "static_share", "ms_vfi_dis", "warping_error", "warping_coverage", "dynamic_degree",
    "dynamic_degree_mean",
)  # fmt: skip


def open_frames(path: Path | None, device: torch.device, shape: Shape) -> Opened:
    """FRAME_COLUMNS. A clip at a time: as floats a batch would take twenty times its bytes, and sums of floats would
    depend on it."""

    def row(clip: Frames) -> Rows:
        clips = torch.from_numpy(np.ascontiguousarray(clip))[None]
        video = clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
        return torch.cat([frame_ssim(clips), flicker(clips), motion_energy(video).double()]).numpy()

    def rows(frames: Frames, prompts: Sequence[str]) -> Rows:
        return np.stack([row(clip) for clip in frames])

    return Opened(rows, {"dtype": "float64", "layer": "pixels, SSIM of range 255"})


def open_flows(path: Path | None, device: torch.device, shape: Shape) -> Opened:
    """FLOW_COLUMNS; NaN where no pixel could be followed."""

    def row(clip: Frames) -> list[float]:
        flows = measure_flows(torch.from_numpy(np.ascontiguousarray(clip)))
        smooth, warped = motion_smoothness(flows), warping_error(flows)
        degree = dynamic_degree(flows, fps=shape.fps)
        error = math.nan if warped.mse is None else warped.mse
        return [
            smooth.value, smooth.static, motion_smoothness_by_interpolation(flows), error, warped.coverage,
            float(degree.dynamic), degree.mean,
        ]  # fmt: skip

    def rows(frames: Frames, prompts: Sequence[str]) -> Rows:
        return np.array([row(clip) for clip in frames], dtype=np.float64)

    return Opened(rows, {"dtype": "float64", "layer": "DIS flow, preset medium"})


def open_thumbnails(path: Path | None, device: torch.device, shape: Shape) -> Opened:
    """Frames evenly apart in a few pixels each, float32 in grey levels."""

    def rows(frames: Frames, prompts: Sequence[str]) -> Rows:
        moments = np.linspace(0, frames.shape[1] - 1, MOMENTS).round().astype(int)
        small = [
            cv2.resize(frame, (SMALL, SMALL), interpolation=cv2.INTER_AREA)
            for clip in frames
            for frame in clip[moments]
        ]
        return np.stack(small).reshape(len(frames), -1).astype(np.float32)

    return Opened(rows, {"resize": SMALL, "moments": MOMENTS})
