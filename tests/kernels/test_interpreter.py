"""The kernels' tests in a process of their own, with Triton's interpreter, where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpreted(*options: str) -> None:
    """Run this folder's tests in the interpreter; what pytest said is shown if one of them fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(Path(__file__).parent)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_ADDOPTS", None)  # it may ask for coverage of the whole package
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and " passed" in done.stdout


def test_the_kernels_in_the_interpreter() -> None:
    interpreted()


@pytest.mark.slow
def test_the_kernels_in_the_interpreter_at_length() -> None:
    interpreted("-m", "slow")


def test_without_a_gpu_or_the_interpreter_the_kernels_say_so() -> None:
    from kernels.geglu import geglu
    from kernels.temporal_attention import temporal_attention

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="needs a CUDA device, and the tensor is on cpu"):
        temporal_attention(torch.zeros(1, 2, 1, 3, 1, 16))
    with pytest.raises(ValueError, match="needs a CUDA device, and the tensor is on cpu"):
        geglu(torch.zeros(1, 2))
