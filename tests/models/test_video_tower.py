"""The towers that a text encoder is pretrained with."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdm.models.video_tower import ContrastiveHead, VideoTower


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=8)
@given(frames=st.integers(1, 9), height=st.integers(1, 9), width=st.integers(1, 9))
def test_any_clip_becomes_one_embedding_and_its_neighbours_do_not_matter(frames: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    tower = VideoTower(4, 12)
    z = latents(3, 4, frames, height, width)
    out = tower(z)
    assert out.shape == (3, 12)
    torch.testing.assert_close(tower(z[1:2]), out[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("axis", [2, 4], ids=["time", "left and right"])
def test_the_order_of_frames_and_columns_shows(axis: int) -> None:
    torch.manual_seed(0)
    tower = VideoTower(4, 12)
    z = latents(1, 4, 8, 8, 8)
    assert (tower(z) - tower(z.flip(axis))).abs().max() > 1e-3


def test_logits_are_cosines_over_the_temperature() -> None:
    torch.manual_seed(0)
    head = ContrastiveHead(4, 12)
    z, text = latents(3, 4, 2, 8, 8), latents(3, 12, seed=1)
    logits = head(z, text)
    video, caption = head.video_tower(z).double(), head.text_projection(text).double()
    for i in range(3):
        for j in range(3):
            cosine = torch.dot(video[i], caption[j]) / (video[i].norm() * caption[j].norm())
            assert logits[i, j].item() == pytest.approx(cosine.item() / 0.07, rel=1e-4, abs=1e-5)
    assert head(z, 5 * text).allclose(logits, atol=1e-4), "lengths do not matter"


def test_the_temperature_is_bounded() -> None:
    head = ContrastiveHead(4, 12)
    head.logit_scale.data.fill_(math.log(1e6))
    assert head(latents(2, 4, 2, 8, 8), latents(2, 12)).abs().max() <= 100.0 + 1e-3


def test_logits_stay_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    head = ContrastiveHead(4, 12)
    z, text = latents(2, 4, 2, 8, 8), latents(2, 12, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(z, text)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).any(), "nor were they ever less"
