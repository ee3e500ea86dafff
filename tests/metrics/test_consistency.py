"""VBench's consistencies by hand and by a loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vdm.metrics.consistency import background_consistency, subject_consistency

E1, E2, BETWEEN = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]


def features(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_by_hand() -> None:
    clips = torch.tensor([[E1, E2, E1], [E1, BETWEEN, E2], [E1, E1, E1], [E1, [-1.0, 0.0], E2]])
    assert subject_consistency(clips).tolist() == pytest.approx([0.25, 0.5, 1.0, 0.0])
    assert torch.equal(subject_consistency(clips), background_consistency(clips))


def test_equals_a_loop_over_the_frames() -> None:
    clips = features(4, 7, 5)
    for clip, value in zip(clips, subject_consistency(clips), strict=True):
        total = 0.0
        for t in range(1, 7):
            last, first = (torch.cosine_similarity(clip[t], clip[other], dim=0).item() for other in (t - 1, 0))
            total += (max(0.0, last) + max(0.0, first)) / 2
        assert value.item() == pytest.approx(total / 6, abs=1e-6)


def test_pure_and_blind_to_length() -> None:
    clips = features(3, 6, 8)
    before, value = clips.clone(), subject_consistency(clips)
    assert torch.equal(subject_consistency(clips), value) and torch.equal(clips, before)
    assert value.dtype == torch.float64 and ((value >= 0) & (value <= 1)).all()
    torch.testing.assert_close(subject_consistency(clips * 3.7), value, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat([subject_consistency(one[None]) for one in clips]), value)


def test_what_has_no_consistency_is_refused() -> None:
    with pytest.raises(ValueError, match="two frames"):
        subject_consistency(features(2, 1, 4))
    with pytest.raises(ValueError, match="two frames"):
        background_consistency(features(2, 4))
    for bad in (torch.nan, torch.inf, 0.0):
        clips = features(1, 3, 4)
        clips[0, 1] = bad
        with pytest.raises(ValueError, match="NaN, infinite or zero"):
            subject_consistency(clips)
