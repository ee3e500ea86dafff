"""benchmarks/memory.py counts what it says, and what is said of recomputation holds at full size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import memory
from vdm.models import UNetConfig

SMALL = UNetConfig(
    unet_dim=16, channel_mult=(1, 2), attention_levels=(True, False), num_res_blocks=1, attention_heads=1,
    attention_head_dim=16, context_dim=16, norm_num_groups=8,
)  # fmt: skip


def test_live_bytes_are_those_of_storages_that_are_alive() -> None:
    before = torch.ones(1000)
    with memory.LiveBytes() as live:
        before.mul_(2)
        a = before + 1
        assert live.now == live.peak == 4000
        view = a.view(10, 100)[3:]
        b = view * 2
        assert live.now == 4000 + 700 * 4
        del a, view
        assert live.now == 700 * 4 and live.peak == 4000 + 700 * 4
        del b
    assert live.now == 0


def test_allocator_peak_is_the_most_at_a_time() -> None:
    def work() -> None:
        for _ in range(3):
            torch.ones(1 << 20).add_(1)

    assert memory.allocator_peak(work, torch.device("cpu")) == pytest.approx(4 << 20, rel=0.01)


@pytest.mark.slow
def test_what_a_clip_keeps_at_full_size() -> None:
    none, cheap, block = (memory.full_size(how, frames=16) for how in memory.MODES)
    assert none["kept"] < 9.0e9, "no more than diffusers' 8.84 GB, but for rounding"
    assert cheap["kept"] < 5.0e9
    assert block["kept"] < 0.48e9 and block["peak_gradients_freed"] < 1.3e9


@pytest.mark.slow
def test_the_command_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "SMALL", SMALL)
    memory.command(["--json", str(tmp_path / "m.json")])
    record = json.loads((tmp_path / "m.json").read_text())
    assert set(record["full_size"]) == set(record["small"]) == {"none", "cheap", "block"}
    assert all(row["gradient_error"] <= 1e-6 and row["peak"] > 0 for row in record["small"].values())


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "size"), memory.SAMPLED[1:])
def test_long_and_large_clips_are_sampled_in_12_gb(frames: int, size: int) -> None:
    at_once = memory.sampling(frames=frames, size=size)
    apart = memory.sampling(frames=frames, size=size, at_once=False)
    assert (
        3e9 < at_once["weights"] < apart["denoising"] < at_once["denoising"] < 10e9
    )  # 12, less context and workspaces
    assert at_once["decoding"] < 10e9
