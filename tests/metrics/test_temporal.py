"""How much a clip moves, by hand and by what must not matter."""

from __future__ import annotations

import pytest
import torch

from vdm.metrics.temporal import motion_energy


def test_by_hand() -> None:
    still = torch.full((3, 4, 2, 2), 0.3)
    blinking = torch.tensor([-1.0, 1.0, -1.0, 1.0])[None, :, None, None].expand(3, 4, 2, 2)
    ramp = torch.linspace(-1, 1, 4)[None, :, None, None].expand(3, 4, 2, 2)
    half = torch.cat([blinking[:, :, :1], still[:, :, :1]], dim=2)
    values = motion_energy(torch.stack([still, blinking, ramp, half]))
    assert values.tolist() == pytest.approx([0.0, 1.0, 1 / 3, 0.5])


def test_neither_direction_nor_what_cannot_be_shown_counts() -> None:
    clip = torch.randn(2, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0)) * 2
    torch.testing.assert_close(motion_energy(clip), motion_energy(clip.flip(2)))
    assert torch.equal(motion_energy(clip), motion_energy(clip.clamp(-1, 1)))
    assert torch.equal(motion_energy(clip), motion_energy(clip.clone())), "nothing is changed in place"


def test_one_frame_does_not_move() -> None:
    assert motion_energy(torch.rand(2, 3, 1, 4, 4)).tolist() == [0.0, 0.0]
