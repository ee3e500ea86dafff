"""Rows of what needs no weights: each column is what the metric's own function says."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from vdm.data.mini_something import render_clip
from vdm.evaluation import pixels
from vdm.evaluation.clips import Shape
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

CPU, NOWHERE = torch.device("cpu"), Path("nowhere")
CLIPS = np.stack([render_clip(i, seed=1, height=32, width=48, num_frames=9, fps=24.0).frames for i in range(2)])
SHAPE = Shape(9, 24.0, 32, 48)


def test_columns_of_frames() -> None:
    rows = pixels.open_frames(NOWHERE, CPU, SHAPE).rows(CLIPS, ["", ""])
    found = dict(zip(pixels.FRAME_COLUMNS, rows.T, strict=True))
    clips = torch.from_numpy(CLIPS)
    assert np.array_equal(found["frame_ssim"], frame_ssim(clips).numpy())
    assert np.array_equal(found["flicker"], flicker(clips).numpy())
    video = clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
    assert np.allclose(found["motion_energy"], motion_energy(video).numpy(), atol=1e-7)


def test_rows_of_frames_are_those_of_each_clip_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, held = pixels.open_frames(NOWHERE, CPU, SHAPE), []
    monkeypatch.setattr(pixels, "frame_ssim", lambda clips: held.append(len(clips)) or frame_ssim(clips))
    clips = np.random.default_rng(0).integers(0, 256, (4, 9, 37, 51, 3), dtype=np.uint8)
    rows = opened.rows(clips, [""] * 4)
    assert held == [1] * 4, "only one is held as floats"
    assert np.array_equal(rows, np.concatenate([opened.rows(clip[None], [""]) for clip in clips]))


def test_columns_of_flows_know_the_frame_rate() -> None:
    rows = pixels.open_flows(NOWHERE, CPU, SHAPE).rows(CLIPS, ["", ""])
    for row, clip in zip(rows, CLIPS, strict=True):
        found = dict(zip(pixels.FLOW_COLUMNS, row.tolist(), strict=True))
        flows = measure_flows(torch.from_numpy(clip))
        degree = dynamic_degree(flows, fps=24.0)
        assert (found["ms_flow"], found["static_share"]) == motion_smoothness(flows)
        assert (found["warping_error"], found["warping_coverage"]) == warping_error(flows)
        assert (found["dynamic_degree"], found["dynamic_degree_mean"]) == (float(degree.dynamic), degree.mean)
        assert found["ms_vfi_dis"] == motion_smoothness_by_interpolation(flows)
        assert degree.mean != dynamic_degree(flows, fps=8.0).mean


def test_small_pictures_are_means_of_areas_at_moments_from_first_to_last() -> None:
    rows = pixels.open_thumbnails(NOWHERE, CPU, SHAPE).rows(CLIPS, ["", ""])
    small = rows.reshape(2, pixels.MOMENTS, pixels.SMALL, pixels.SMALL, 3)
    for place, frame in ((0, 0), (-1, 8)):
        areas = cv2.resize(CLIPS[1, frame], (pixels.SMALL, pixels.SMALL), interpolation=cv2.INTER_AREA)
        assert np.array_equal(small[1, place], areas)
    assert np.allclose(small[0, 0], CLIPS[0, 0].reshape(8, 4, 8, 6, 3).mean((1, 3)), atol=0.51)
