"""What all tests share: how hypothesis draws, where the real clips are, and commands, in this process or their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from vdm.cli import run, sample_command, train_command, vdm_command

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"train.py": train_command, "sample.py": sample_command, "vdm": vdm_command}

# The same examples on every run, and no deadline: the first call of a network or a codec is many times slower.
settings.register_profile("vdm", deadline=None, derandomize=True)
settings.load_profile("vdm")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """In two processes with a thread each, a file at a time, unless `-n` says otherwise; tests are too small for more
    threads. To debug, without pytest-xdist, and slow ones, which may want all the memory, in this one."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # this is one of the two
    if not config.pluginmanager.hasplugin("xdist") or config.option.usepdb or config.option.collectonly:
        return
    measured = getattr(config.option, "cov_source", None)  # pytest-cov has taken one process for granted by now
    if config.option.numprocesses is None and not measured and "not slow" in config.option.markexpr:
        config.option.numprocesses, config.option.dist = 2, "loadfile"
    if config.option.numprocesses:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes inherit it, and so do the commands they run


@pytest.fixture(scope="session")
def clips_dir() -> Path:
    """The folder of real clips: VDM_TEST_CLIPS, else `shared/clips` beside the checkout."""
    default = ROOT.parent / "shared" / "clips"
    folder = Path(os.environ.get("VDM_TEST_CLIPS") or default)
    if not (folder / "annotations.json").is_file():
        pytest.skip(f"the real clips are not in {folder}; set VDM_TEST_CLIPS to their folder")
    return folder


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
