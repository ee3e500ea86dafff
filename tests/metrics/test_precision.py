"""Full float32, and everything as it was before."""

from __future__ import annotations

import pytest
import torch

from vdm.metrics.precision import full_precision


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
