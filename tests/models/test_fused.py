"""Which operations a UNet runs on, and what is said where the fused ones cannot run."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import UNET

from vdm.config import Config, load, to_yaml
from vdm.errors import UserError
from vdm.flops import _unet_forward
from vdm.interop.names import unet_tensors
from vdm.models import UNet3D, fused
from vdm.models.fused import PLAIN, choose
from vdm.pipeline import TextToVideo
from vdm.training import lora, resuming
from vdm.training.resuming import changes

ON_KERNELS = replace(UNET, attention_kernel="triton")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, and with Triton."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fused._warn.cache_clear()


@pytest.fixture
def other_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Another package named kernels, found before ours."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(): ...\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "kernels"


def test_auto_is_sdpa_without_a_gpu_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose("auto") is choose("sdpa") is PLAIN is UNet3D(UNET).operations
    assert capsys.readouterr().err == ""


def test_triton_without_a_gpu_is_refused() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    with pytest.raises(UserError, match="attention_kernel is triton, but there is no CUDA device; set it to auto or"):
        UNet3D(ON_KERNELS)


def test_triton_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="triton is not installed"):
        choose("triton")


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(UserError, match="Tesla T4 is older than compute capability 8.0"):
        choose("triton")
    assert choose("auto") is PLAIN


def test_on_a_gpu_auto_takes_the_kernels_and_leaves_to_sdpa_what_they_cannot_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tensors here are on the CPU all the same."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(fused, "_problem_of", lambda *_: None)  # which tries them on that GPU
    qkv, x = torch.randn(1, 3, 2, 3, 1, 4), torch.randn(2, 6)
    operations = choose("auto")
    assert operations is not PLAIN
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert torch.equal(operations.attend_frames(qkv), PLAIN.attend_frames(qkv))
        assert torch.equal(operations.geglu(x), PLAIN.geglu(x))
    with pytest.raises(UserError, match="triton, but the kernel needs a CUDA device, and the tensor is on cpu"):
        choose("triton").attend_frames(qkv)


def test_auto_tries_the_kernels_before_it_takes_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    shape = (2, 5, 3, 3, 2, 64)
    assert fused._difference("attention", PLAIN.attend_frames, PLAIN.attend_frames, shape) is None
    wrong = fused._difference("attention", lambda x: 1.1 * PLAIN.attend_frames(x), PLAIN.attend_frames, shape)
    assert wrong == "the fused attention computes something else than PyTorch's"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # and then there is none
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    fused._problem_of.cache_clear()
    assert choose("auto") is PLAIN
    assert "attention_kernel=auto means sdpa here, for the fused attention fails (" in capsys.readouterr().err
    fused._problem_of.cache_clear()


def test_another_package_of_the_name_is_warned_of_once(other_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert UNet3D(UNET).operations is UNet3D(UNET).operations is PLAIN
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1
    assert "another package named kernels" in warning and str(other_package) in warning
    choose("sdpa")
    assert capsys.readouterr().err == ""


def test_another_package_of_the_name_is_an_error_for_triton(other_package: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    with pytest.raises(UserError, match="another package named kernels"):
        choose("triton")


def test_what_computes_nothing_does_not_ask_for_the_kernels() -> None:
    assert unet_tensors(ON_KERNELS).keys() == unet_tensors(UNET).keys()
    assert _unet_forward(ON_KERNELS, (1, 2, 2), 3) == _unet_forward(UNET, (1, 2, 2), 3) > 0


def test_configs_without_the_key_load(tmp_path: Path) -> None:
    lines = [line for line in to_yaml(Config("x")).splitlines() if "attention_kernel" not in line]
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    assert load(tmp_path / "x.yaml").model.attention_kernel == "auto"
    with pytest.raises(UserError, match="attention_kernel"):
        load(tmp_path / "x.yaml", ["attention_kernel=flash"])


def test_a_model_trained_on_the_kernels_loads_where_they_cannot_run(tmp_path: Path) -> None:
    pipe = TextToVideo.from_pretrained()
    pipe.config = replace(pipe.config, model=replace(pipe.config.model, attention_kernel="triton"))
    pipe.save_pretrained(tmp_path / "model")
    assert load(tmp_path / "model" / "config.yaml").model.attention_kernel == "triton"
    assert TextToVideo.from_pretrained(tmp_path / "model").config.model.attention_kernel == "auto"


def test_a_run_resumes_and_a_lora_is_trained_on_another_kernel() -> None:
    config = Config("x")
    changed = replace(config, model=replace(config.model, attention_kernel="sdpa"))
    assert set(changes(config, changed)) == {"model.attention_kernel"} <= set(resuming.FREE)
    assert "attention_kernel" in lora.FREE
