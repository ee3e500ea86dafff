"""What every benchmark writes beside its numbers: on what they were measured, with which versions, by which command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import vdm
from vdm.errors import UserError
from vdm.metrics.action_scores import Share
from vdm.metrics.intervals import wilson


def environment(device: torch.device) -> dict[str, object]:
    """Device, versions, commit (None without git; with a + where files differ), command and date, as JSON values."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": {"vdm": vdm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def versions(*names: str) -> dict[str, str]:
    """Of the packages that are there; a package may go by another name than it is imported by."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def row_of(share: Share) -> dict[str, object]:
    """A share of clips as JSON values, with Wilson's interval."""
    value, ci95 = (share.value, wilson(share.right, share.of)) if share.of else (None, None)
    return {"right": share.right, "clips": share.of, "value": value, "ci95": ci95}


def write_json(path: Path, record: dict[str, object]) -> None:
    """A path is written as its text. Raises `UserError` where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, default=os.fspath) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another --json file") from error
