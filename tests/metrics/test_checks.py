"""What is a clip, and what is a feature."""

from __future__ import annotations

import pytest
import torch

from vdm.metrics.checks import require_frames, unit


def test_a_clip_is_grey_levels_with_the_channels_last() -> None:
    good = torch.zeros(1, 2, 4, 5, 3, dtype=torch.uint8)
    require_frames(good)
    for bad in (good.float(), good[0], good.movedim(-1, 2), good[:, :0]):
        with pytest.raises(ValueError, match=r"uint8 \(B, T, H, W, 3\)"):
            require_frames(bad)


def test_unit_vectors() -> None:
    torch.testing.assert_close(unit(torch.tensor([[3.0, 4.0], [0, -2]])), torch.tensor([[0.6, 0.8], [0, -1]]))
    for bad in (0.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN, infinite or zero"):
            unit(torch.full((2, 3), bad))
