"""What all tests share: how hypothesis draws, and where the real clips are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples on every run, and no deadline: the first call of a network or a codec is many times slower.
settings.register_profile("vdm", deadline=None, derandomize=True)
settings.load_profile("vdm")


@pytest.fixture(scope="session")
def clips_dir() -> Path:
    """The folder of real clips: VDM_TEST_CLIPS, else `shared/clips` beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "clips"
    folder = Path(os.environ.get("VDM_TEST_CLIPS") or default)
    if not (folder / "annotations.json").is_file():
        pytest.skip(f"the real clips are not in {folder}; set VDM_TEST_CLIPS to their folder")
    return folder
