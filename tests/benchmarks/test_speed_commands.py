"""benchmarks/train_step.py and sample.py: whole commands on networks of a moment, and what they compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import kernel_command, sample, timing, train_step
from benchmarks.contenders import channels_last
from vdm.errors import UserError
from vdm.models import UNetConfig

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny.yaml"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.REPEATS, "cpu", 2)


def test_a_step_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    where = ["--config", str(TINY), "--device", "cpu", "--size", "16", "--num_frames", "2"]
    train_step.command([*where, "--json", str(file), "--profile", str(tmp_path / "profile")])
    rows = json.loads(file.read_text())["rows"]
    assert [row["which"] for row in rows] == list(train_step.PASSES)
    assert all(row["name"] == "vdm" and row["ms"] > 0 and row["ours_is_faster"] == 1.0 for row in rows)
    assert (tmp_path / "profile" / "trace.json").is_file() and (tmp_path / "profile" / "kernels.txt").is_file()
    assert "| forward and backward | vdm |" in capsys.readouterr().out


@pytest.mark.parity
def test_the_rival_has_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    tiny = UNetConfig(unet_dim=32, channel_mult=(1, 2, 2, 2), attention_head_dim=16, context_dim=16)
    monkeypatch.setattr(train_step, "SMALL", tiny)
    file = tmp_path / "step.json"
    train_step.command(
        ["--device", "cpu", "--size", "64", "--num_frames", "2", "--rival", "diffusers", "--json", str(file)]
    )
    record = json.loads(file.read_text())
    assert record["apart"] < 1e-5 and {row["name"] for row in record["rows"]} == {"vdm", "diffusers"}


def test_one_pass_alone_and_the_values_of_a_config(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    where = ["--config", str(TINY), "--device", "cpu", "--size", "16", "--num_frames", "2", "--batch_size", "1"]
    train_step.command([*where, "--only", "forward", "--json", str(file), "training.mixed_precision=no"])
    assert [row["which"] for row in json.loads(file.read_text())["rows"]] == ["forward"]
    where = ["--config", str(TINY), "--device", "cpu", "--steps", "1", "--batch_size", "1", "--only", "to latents"]
    sample.command([*where, "--json", str(file), "sampling.guidance_scale=1.0"])
    record = json.loads(file.read_text())
    assert [row["part"] for row in record["rows"]] == ["to latents"] and record["sampling"]["guidance_scale"] == 1
    for command in (sample.command, train_step.command):
        with pytest.raises(UserError, match="seed=1 replaces a value of --config; give that, too"):
            command(["seed=1"])


def test_random_weights_of_a_config_need_no_network(tmp_path: Path) -> None:
    where = ["--config", str(TINY), "--device", "cpu", "--steps", "1", "--batch_size", "1", "--only", "to latents"]
    sources = ["text.text_weights=ViT-H-14/laion2b_s32b_b79k", "vae.vae_weights=nowhere"]
    sample.command([*where, "--json", str(tmp_path / "sample.json"), *sources])
    assert (tmp_path / "sample.json").is_file()


def test_weights_of_two_dimensional_convolutions_lie_channels_last() -> None:
    layers = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv3d(4, 4, 3)])
    channels_last(layers)
    assert layers[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert layers[1].weight.is_contiguous()


def test_sampling_is_timed(tmp_path: Path) -> None:
    file = tmp_path / "sample.json"
    where = ["--config", str(TINY), "--device", "cpu", "--steps", "1", "--batch_size", "1", "--guidance_scale", "0"]
    sample.command([*where, "--json", str(file)])
    record = json.loads(file.read_text())
    assert [row["part"] for row in record["rows"]] == list(sample.PARTS)
    assert record["sampling"]["guidance_scale"] == 0


@pytest.mark.slow
@pytest.mark.parity
def test_the_rival_makes_the_same_clips(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    file = tmp_path / "sample.json"
    sample.command(
        ["--device", "cpu", "--steps", "2", "--batch_size", "1", "--rival", "diffusers", "--json", str(file)]
    )
    assert json.loads(file.read_text())["apart"] < 1e-4


def test_impossible_sizes_are_named() -> None:
    with pytest.raises(UserError, match="--size divisible by 8"):
        train_step.command(["--device", "cpu", "--size", "30"])
    with pytest.raises(UserError, match="--batch_size must be at least 1"):
        sample.command(["--batch_size", "0"])


def test_a_check_that_fails_says_why() -> None:
    assert str(kernel_command.interpreted("raise ValueError('wrong')")).endswith("failed: ValueError: wrong")
