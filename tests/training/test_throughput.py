"""Speed, waiting, operations and memory of the steps between two lines of the log."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from vdm.config import load
from vdm.data.loader import Batch
from vdm.flops import unet_forward
from vdm.training.throughput import Window, peak_memory, peak_tflops

TINY = Path(__file__).parents[1] / "fixtures" / "tiny.yaml"
CPU = torch.device("cpu")


def batch(count: int, frames: int) -> Batch:
    names = [str(i) for i in range(count)]
    return Batch(torch.zeros(count, 3, frames, 4, 4), names, names, list(range(count)), list(range(count)), [])


def test_a_window_by_hand() -> None:
    config = load(TINY)
    window = Window(config, CPU)
    step = {"lr": 0.5, "sum_t1": 6.0, "count_t1": 2.0, "sum_t2": 0.0, "count_t2": 0.0}
    window.add({**step, "loss": 3.0}, [batch(2, 4), batch(2, 4)], waited=1.0, seconds=2.0)
    window.add({**step, "loss": math.nan, "sum_t1": math.nan}, [batch(1, 3)], waited=0.5, seconds=4.0)
    values = window.close()
    operations = 3 * (4 * unet_forward(config, num_frames=4) + unet_forward(config, num_frames=3))
    assert values.pop("peak_rss_gb") > 0.01
    assert values == pytest.approx(
        {
            "lr": 0.5,
            "loss": 3.0,
            "loss_t1": 3.0,
            "videos_per_second": 5 / 6,
            "seconds_per_step": 3.0,
            "data_wait_share": 0.25,
            "tflops": operations / 6 / 1e12,
        }
    )
    window.add({"loss": 1.0}, [batch(1, 4)], waited=0.0, seconds=1.0)
    assert window.close()["videos_per_second"] == 1.0, "a window begins anew"


def test_operations_are_counted_of_the_unet_alone() -> None:
    rates = {}
    for name, overrides in {
        "unet": (), "lora": ("training.lora_rank=2", "training.init_from=x", "text.text_trainable=false"),
        "vae": ("training.task=vae",), "text": ("training.task=text",)
    }.items():  # fmt: skip
        window = Window(load(TINY, overrides), CPU)
        window.add({"loss": 1.0}, [batch(2, 4)], waited=0.0, seconds=1.0)
        rates[name] = window.close().get("tflops")
    assert rates["unet"] is not None and rates["lora"] == pytest.approx(rates["unet"] * 2 / 3)
    assert rates["vae"] is rates["text"] is None


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "fp16", 312.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "bf16", 989.0),
        ("NVIDIA GeForce RTX 4090", "fp16", 165.2),
        ("NVIDIA A100-SXM4-80GB", "no", None),
        ("NVIDIA GeForce GTX 1080", "fp16", None),
        ("", "bf16", None),
    ],
)
def test_peaks_are_known_by_name(device: str, precision: str, peak: float | None) -> None:
    assert peak_tflops(device, mixed_precision=precision) == peak


def test_mfu_is_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7_000_000_000)
    window = Window(load(TINY, ["training.mixed_precision=bf16"]), torch.device("cuda"))
    window.add({"loss": 1.0}, [batch(2, 4)], waited=0.0, seconds=1.0)
    values = window.close()
    assert values["mfu"] == pytest.approx(values["tflops"] / 312.0)
    assert values["peak_memory_gb"] == 7.0 and "peak_rss_gb" not in values


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the oracle is Linux's own book-keeping")
def test_memory_of_a_process_is_its_highest() -> None:
    told = Path("/proc/self/status").read_text()
    highest = int(re.findall(r"VmHWM:\s+(\d+) kB", told)[0]) * 1024 / 1e9
    assert peak_memory(CPU)["peak_rss_gb"] == pytest.approx(highest, rel=0.02)
