"""A run tries all that it will do before it goes on for days, and is the same run as without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, Command
from vdm.config import Config, load
from vdm.errors import CannotWrite
from vdm.training import saving
from vdm.training import trainer as trainer_module
from vdm.training.loop import train
from vdm.training.verify import differences

TINY = ROOT / "tests" / "fixtures" / "tiny.yaml"
SHORT = ("training.max_train_steps=3", "training.validation_steps=2", "training.checkpointing_steps=2")


def config_of(run_dir: Path, *overrides: str) -> Config:
    return load(TINY, [f"run_dir={run_dir}", "training.rehearsal=true", *SHORT, *overrides])


def records(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    timings = ("videos_per_second", "seconds_per_step", "data_wait_share", "tflops", "peak_rss_gb")
    return [{key: value for key, value in line.items() if key not in timings} for line in lines]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_rehearsed_run_is_the_same_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dropout = "model.dropout=0.3"
    plain = train(config_of(tmp_path / "plain", dropout, "training.rehearsal=false"))
    assert "rehearsal" not in capsys.readouterr().err
    rehearsed = train(config_of(tmp_path / "rehearsed", dropout))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("rehearsal: "))
    for part in ("validation", "preview", "the first step", "save", "peak memory"):
        assert f"{part} " in line
    assert list(differences(plain, rehearsed)) == []
    for step in (2, 3):
        pair = [tmp_path / run / f"checkpoint-{step}" for run in ("plain", "rehearsed")]
        assert list(differences(*pair)) == []
    first, *others = records(tmp_path / "rehearsed")
    start, *same = records(tmp_path / "plain")
    assert first["step"] == 1 and first["val_loss"] > 0 and "val_loss" not in start
    assert first | start == first and others == same
    assert names(tmp_path / "rehearsed") == names(tmp_path / "plain"), "nothing hidden is left behind"
    shown = names(tmp_path / "rehearsed" / "samples")
    assert shown == names(tmp_path / "plain" / "samples") | {"step-000000"}


@pytest.mark.slow
def test_a_run_that_goes_on_rehearses_too_and_shows_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config_of(tmp_path, "training.stop_after_steps=2"))
    before, shown = records(tmp_path), names(tmp_path / "samples")
    capsys.readouterr()
    train(config_of(tmp_path), resume="latest")
    assert "rehearsal: validation" in capsys.readouterr().err
    assert records(tmp_path)[: len(before)] == before and records(tmp_path)[-1]["step"] == 3
    assert names(tmp_path / "samples") == shown | {"step-000003"}
    train(config_of(tmp_path), resume="latest")
    assert "rehearsal" not in capsys.readouterr().err, "of a run that is over there is nothing to try"


def test_a_run_that_never_looks_does_not_in_its_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config_of(tmp_path, "training.validation_steps=0"))
    err = capsys.readouterr().err
    assert "rehearsal: the first step" in err and "preview" not in err
    assert not (tmp_path / "samples").exists() and records(tmp_path)[0]["step"] == 1


def test_a_preview_that_cannot_be_written_ends_the_run_at_once(command: Command, tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("in the way")
    result = command("train.py", TINY, f"run_dir={tmp_path}", "training.rehearsal=true")
    assert result.error.startswith("preview failed in the rehearsal of the run: ")
    assert "training.rehearsal=false" in result.error and "samples" in result.error
    assert not (tmp_path / "log.jsonl").read_text()
    assert not list(tmp_path.glob("checkpoint-*"))


def refuse(error: BaseException) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


def test_a_disk_that_is_too_small_ends_the_run_after_its_first_step(
    monkeypatch: pytest.MonkeyPatch, command: Command, tmp_path: Path
) -> None:
    monkeypatch.setattr(saving, "save_checkpoint", refuse(CannotWrite("it is full; free space")))
    result = command("train.py", TINY, f"run_dir={tmp_path}", "training.rehearsal=true")
    assert result.error.startswith("save failed in the rehearsal of the run: it is full; free space")


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory"), MemoryError()]
)
def test_too_little_memory_is_a_sentence_that_names_the_plan(
    monkeypatch: pytest.MonkeyPatch, command: Command, tmp_path: Path, error: BaseException
) -> None:
    monkeypatch.setattr(trainer_module.Trainer, "train_step", refuse(error))
    result = command("train.py", TINY, f"run_dir={tmp_path}", "training.rehearsal=true", "validation_steps=0")
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: the first step ran out of memory in the rehearsal")
    assert "--plan --gpu" in result.err and "Traceback" not in result.err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trainer_module.Trainer, "train_step", refuse(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(config_of(tmp_path, "training.validation_steps=0"))


@pytest.mark.slow
def test_what_a_killed_rehearsal_leaves_is_no_checkpoint_and_is_cleared_away(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from vdm.training import rehearsal\n"
        "from vdm.training.trainer import Trainer\n"
        "write = Trainer.write\n"
        "def die(self, path):\n    write(self, path)\n    os.kill(os.getpid(), 9)\n"
        "Trainer.write = die\n"
        "from vdm.cli import run, train_command\n"
        "run(train_command)\n"
    )
    words = [str(TINY), f"run_dir={tmp_path}", "training.rehearsal=true", *SHORT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == -9
    (left,) = tmp_path.glob(".rehearsal.*")
    assert (left / "manifest.json").is_file()
    train(config_of(tmp_path), resume="latest")
    assert not list(tmp_path.glob(".rehearsal.*")) and [line["step"] for line in records(tmp_path)] == [1, 2, 3]
