"""Where the kernels' tests run: on a GPU, or in Triton's interpreter, which must be chosen before Triton is imported.

So without a GPU they are collected in a process with TRITON_INTERPRET=1 only: test_interpreter.py starts one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    collect_ignore = ["test_interpreter.py", "test_offline.py"]
elif not torch.cuda.is_available():
    NAMES = ("temporal_attention", "geglu", "group_norm", "add_layer_norm", "in_unet")
    collect_ignore = [f"test_{name}.py" for name in NAMES]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU the kernels' tests are those of `pytest -m gpu`; elsewhere ordinary ones, in the interpreter."""
    if INTERPRETED or not torch.cuda.is_available():
        return
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.stem not in ("test_interpreter", "test_offline"):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU convolutions in float32 are otherwise in TF32, and differ with how their tensors lie in memory."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
