"""How many looks are encoded at a time, and that each gets its own latents; the whole command is tested elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vdm import precompute
from vdm.components import build_vae
from vdm.config import load
from vdm.precompute import Writer

TINY = Path(__file__).parent / "fixtures" / "tiny.yaml"


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1, 1, 1]), (4 * 16 * 16, [2, 1]), (2**21, [3])])
def test_a_gpu_encodes_as_many_looks_as_it_has_room_for(
    monkeypatch: pytest.MonkeyPatch, limit: int, sizes: list[int]
) -> None:
    config = load(TINY)
    vae = build_vae(config)
    monkeypatch.setattr(precompute, "PIXELS_AT_ONCE", limit)
    batches: list[int] = []
    encode = vae.encode

    def counted(video: torch.Tensor) -> object:
        batches.append(len(video))
        return encode(video)

    writer = Writer.__new__(Writer)
    writer.config, writer.vae, writer.dtype = config, vae, torch.float32
    monkeypatch.setattr(vae, "encode", counted)
    rng = np.random.default_rng(0)
    looks = {str(i): rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8) for i in range(3)}
    writer.device = torch.device("cpu")
    alone = writer._moments(looks)
    assert batches == [1, 1, 1], "a CPU gains nothing by more"
    batches.clear()
    writer.device = torch.device("cuda")
    assert writer.at_once(2 * 16 * 16) == max(1, limit // (2 * 16 * 16))
    at_once = writer.at_once(2 * 16 * 16)
    writer.device = torch.device("cpu")
    monkeypatch.setattr(Writer, "at_once", lambda self, pixels: at_once)
    together = writer._moments(looks)
    assert batches == sizes
    for name, moments in alone.items():
        torch.testing.assert_close(together[name], moments, atol=1e-5, rtol=1e-5)
