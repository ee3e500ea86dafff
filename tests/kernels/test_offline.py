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
import itertools, json, sys, torch
from kernels import offline
if offline.ptxas() is None:
    raise SystemExit(3)
found = {}
kinds = [getattr(torch, name) for name in sys.argv[1].split(",")]
shapes = json.loads(sys.argv[2])
for arch, dtype, backward in itertools.product((80, 90), kinds, (False, True)):
    for frames, head_dim in shapes:
        name = f"attention sm_{arch} {dtype} F={frames} D={head_dim} backward={backward}"
        found[name] = offline.attention_resources(frames, head_dim, dtype, backward=backward, arch=arch)
    name = f"geglu sm_{arch} {dtype} backward={backward}"
    found[name] = offline.geglu_resources(1280, dtype, backward=backward, arch=arch)
print(json.dumps(found))
"""


def compiled(tmp_path: Path, kinds: str, shapes: list[tuple[int, int]]) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, kinds, json.dumps(shapes)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode == 3:
        pytest.skip("triton came without ptxas")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, taken in found.items():
        print(name, taken)
        assert taken["spills"] == 0, (name, taken)
        assert taken["registers"] > 16 and taken["shared"] <= 96 * 1024, (name, taken)
    assert len(found) == 4 * len(kinds.split(",")) * (len(shapes) + 1)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["bfloat16", "float32"])
def test_nothing_spills(tmp_path: Path, kinds: str) -> None:
    """float16 compiles to the same instructions as bfloat16 but for the name of the type; float32 beyond 32 frames
    does spill in the backward pass, which `block_sizes` says."""
    compiled(tmp_path, kinds, [(16, 64), (24, 64), (16, 40), (24, 128)] + ([(64, 64)] if kinds == "bfloat16" else []))
