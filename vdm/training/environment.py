"""What a run was started with: `environment.json`, one record a start."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import vdm
from vdm.files import replacing

FILE = "environment.json"
PACKAGES = ("open_clip_torch", "numpy", "opencv-python", "av", "safetensors")


def record_start(run_dir: Path, *, step: int, device: torch.device) -> None:
    """Add a record of this process to the run's file, which a process that dies cannot damage; `step` is the first to
    come less one. Raises CannotWrite."""
    records = [*read_starts(run_dir), {"step": step, **describe(device)}]
    with replacing(run_dir / FILE, remedy="free space there or choose another run_dir") as file:
        file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def read_starts(run_dir: Path) -> list[dict[str, object]]:
    """All records of a run; none where there is no file, or one that is not ours."""
    try:
        found = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [record for record in found if isinstance(record, dict)] if isinstance(found, list) else []


def describe(device: torch.device) -> dict[str, object]:
    """This process: when, how and by what it was started, and on what it runs."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "vdm": vdm.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        **{name: _version(name) for name in PACKAGES},
        "device": gpu or f"{platform.machine()} CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # opencv goes by several names
        return None


@cache
def commit() -> str | None:
    """The git commit of the checkout that vdm runs from, with "-dirty" where files differ; None outside of one."""
    root = Path(vdm.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
