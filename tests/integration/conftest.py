"""One run that many tests look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, shell: Callable[..., Any]) -> Path:
    """The folder of a whole run of `python train.py tests/fixtures/tiny.yaml`; not to be changed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    result = shell("train.py", "tests/fixtures/tiny.yaml", f"run_dir={run_dir}")
    assert result.code == 0, result
    assert f"finished: {run_dir / 'final'}" in result.out
    return run_dir
