"""What the kernels take of a GPU, by compiling them for one: they must not spill out of registers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# In a process without TRITON_INTERPRET, which leaves nothing to compile.
CODE = """
import itertools, json, torch
from kernels import offline
if offline.ptxas() is None:
    raise SystemExit(3)
found = {}
SHAPES = {torch.bfloat16: offline.SHAPES, torch.float16: ((16, 64), (64, 128)), torch.float32: ((16, 64), (24, 64))}
for arch, (dtype, shapes), backward in itertools.product((80, 90), SHAPES.items(), (False, True)):
    for frames, head_dim in shapes:
        name = f"attention sm_{arch} {dtype} F={frames} D={head_dim} backward={backward}"
        found[name] = offline.attention_resources(frames, head_dim, dtype, backward=backward, arch=arch)
    for kernel, width, taken in offline.others(dtype, backward=backward, arch=arch):
        found[f"{kernel} {width} sm_{arch} {dtype} backward={backward}"] = taken
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_nothing_spills(tmp_path: Path) -> None:
    """Of float32 and float64 beyond 32 frames the backward pass does, as `block_sizes` says."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("triton came without ptxas")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 96
    for name, taken in found.items():
        print(name, taken)
        assert taken["spills"] == 0, (name, taken)
        assert taken["registers"] > 16 and taken["shared"] <= 96 * 1024, (name, taken)
