"""The command of benchmarks of our kernels: times on a GPU; without one, what can be known all the same.

That is what the CPU runs, how exact the kernels are in Triton's interpreter, and what they take of a GPU when compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.common import environment, versions, write_json
from benchmarks.rows import Row, summary, table
from benchmarks.timing import clocks, copy_bandwidth
from vdm.cli import Parser
from vdm.generate import pick_device

ROOT = Path(__file__).resolve().parents[1]
LARGEST_ERROR = 1e-2  # in the Euclidean norm, of bfloat16
Rows = Callable[[torch.device, float], Iterable[Row]]


def compare(arguments: Sequence[str], *, prog: str, title: str, gpu_rows: Rows, cpu_rows: Rows, check: str) -> None:
    """Print and save the rows of a device, which are given it and its copy bandwidth in bytes a second. `check` is code
    for the interpreter, which prints errors as JSON."""
    parser = Parser(prog=prog, description=title.split("\n")[0])
    parser.flag("--device", help="cuda or cpu; a GPU by default where there is one")
    parser.flag("--minutes", type=float, metavar="F", help="begin no other shape after so long")
    parser.flag("--json", type=Path, metavar="FILE", help="save the table")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    copy = copy_bandwidth(device)
    facts = {**environment(device), "gpu": clocks() if on_gpu else None, "copy_gb_per_s": copy / 1e9}
    facts["others"] = versions("triton", "diffusers")
    print(json.dumps(facts, indent=1))
    if not on_gpu:
        print("These are CPU times, in which the kernels have no part: how fast those are, they do not say.")
    rows: list[Row] = []
    for row in (gpu_rows if on_gpu else cpu_rows)(device, copy):
        late = options.minutes is not None and time.monotonic() - began > 60 * options.minutes
        if late and rows and row.shape != rows[-1].shape:
            print(f"{row.shape} and what follows are left out: {options.minutes:g} minutes are over")
            break
        for line in table([row], titles=not rows):
            print(line, flush=True)
        rows.append(row)
    for row in rows:
        if row.which == "forward" and row.error is not None and row.error > LARGEST_ERROR:
            print(f"warning: {row.name} at {row.shape} is off by {row.error:.1e} of float64")
    if on_gpu:
        print(*summary(rows), sep="\n")
    record: dict[str, object] = {**facts, "rows": [asdict(row) for row in rows]}
    if not on_gpu:
        errors, taken = interpreted(check), compiled()
        print("in Triton's interpreter, float32 against float64:", errors)
        print(*taken, sep="\n")
        record |= {"interpreter": errors, "compiled": taken}
    if options.json:
        write_json(options.json, record)


def interpreted(check: str) -> dict[str, float] | str:
    """Errors of kernels by name, as `check` prints them; or why there are none."""
    if find_spec("triton") is None:
        return "triton is not installed"
    done = _python("-c", check, TRITON_INTERPRET="1")
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1]}"
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compiled() -> list[str]:
    """What the kernels take of a GPU, as far as it can be found without one: lines of a table; or why there is none."""
    if find_spec("triton") is None:
        return ["triton is not installed"]
    done = _python("-m", "kernels.offline", "bf16")
    return done.stdout.splitlines() if done.returncode == 0 else [f"failed: {done.stderr.strip().splitlines()[-1]}"]


def _python(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    others = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**others, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
