"""What every benchmark writes beside its numbers: on what they were measured, with which versions, by which command."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import cv2
import numpy as np
import torch

import vdm
from vdm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; None is a GPU where there is one. Raises `UserError` where it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def environment(device: torch.device) -> dict[str, object]:
    """Device, versions, commit, command and date, as JSON values."""
    gpu = device.type == "cuda"
    versions = {"torch": torch.__version__, "vdm": vdm.__version__, "numpy": np.__version__, "opencv": cv2.__version__}
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"{platform.processor() or platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions, "cuda": torch.version.cuda if gpu else None},
        "commit": _commit(),
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The commit of the checkout, with a + where files differ from it; None where there is no git."""
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_json(path: Path, record: dict[str, object]) -> None:
    """Raises `UserError` where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another --json file") from error
