"""Whole commands, in a process of their own or in this one, and one run that many tests look at."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vdm.cli import run, sample_command, train_command, vdm_command

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {"train.py": train_command, "sample.py": sample_command, "vdm": vdm_command}


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence about bad input; fails where there is more or less than that."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.code == 2 and len(lines) == 1 and "Traceback" not in self.err, self
        assert self.err.endswith(lines[0] + "\n"), "it is the last word"
        return lines[0].removeprefix("error: ")


Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """command("train.py", *arguments): run a command in this process, which saves the seconds of importing torch."""

    def command(name: str, *arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        try:
            code = run(COMMANDS[name])
        except SystemExit as leaving:  # --help
            assert leaving.code in (None, 0)
            code = 0
        shown = capsys.readouterr()
        return Result(code, shown.out, shown.err)

    return command


def shell(*arguments: object) -> Result:
    """`python ARGUMENTS` from the root of the checkout, in a process of its own."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(name="shell", scope="session")
def shell_fixture() -> Command:
    return shell


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of `python train.py tests/fixtures/tiny.yaml`; not to be changed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    result = shell("train.py", "tests/fixtures/tiny.yaml", f"run_dir={run_dir}")
    assert result.code == 0, result
    assert f"finished: {run_dir / 'final'}" in result.out
    return run_dir
