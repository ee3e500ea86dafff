"""How many looks are encoded at a time, and that each gets its own latents; the whole command is tested elsewhere."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from vdm import precompute
from vdm.components import build_vae
from vdm.config import load
from vdm.data.dataset import ClipDataset
from vdm.data.latents import Looks
from vdm.precompute import Writer
from vdm.training.cached import streams

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


def test_a_clip_whose_worker_died_is_tried_once_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is lost for want of memory would be missing from the cache for good."""
    read = precompute.read_looks

    def dies(clips: ClipDataset, index: int, *, num_crops: int) -> Looks:
        mark = tmp_path / str(index)
        if index == 2 or index == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(clips, index, num_crops=num_crops)

    monkeypatch.setattr(precompute, "read_looks", dies)
    writer = Writer.__new__(Writer)
    writer.config = load(TINY, ["data.dataloader_num_workers=1"])
    writer.clips = streams(writer.config)
    found = dict(writer._read("train", range(4)))
    assert sorted(found) == [0, 1, 2, 3]
    assert [index for index, looks in found.items() if looks.entry.problem] == [2]
    assert found[1].frames and not found[2].frames
