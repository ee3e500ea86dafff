"""Full float32, and everything as it was before."""

from __future__ import annotations

import pytest
import torch

from vdm.metrics.precision import full_precision, unit


def test_what_was_set_is_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError), torch.autocast("cpu", dtype=torch.bfloat16), full_precision(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
            assert not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        assert torch.is_grad_enabled()
    finally:
        torch.set_float32_matmul_precision(before)


def test_unit_vectors() -> None:
    torch.testing.assert_close(unit(torch.tensor([[3.0, 4.0], [0, -2]])), torch.tensor([[0.6, 0.8], [0, -1]]))
    for bad in (0.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN, infinite or zero"):
            unit(torch.full((2, 3), bad))
