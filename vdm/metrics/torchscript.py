"""TorchScript archives: the form in which two of the published networks are given away."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import torch

from vdm.errors import UserError


def is_torchscript(path: Path) -> bool:
    """Whether a file is such an archive, by its content; what cannot be read is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def load_torchscript(path: Path) -> torch.jit.ScriptModule:
    """The module in an archive, on the CPU, in eval mode. TorchScript holds no Python. Raises UserError if damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.load is deprecated, but nothing else reads these files
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error) or "no reason is given").strip().splitlines()[0]
        raise UserError(f"{path} cannot be read as TorchScript ({reason}); download or copy it again") from error
