"""Runs that are told to stop, or have no room on the disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vdm import checkpoint
from vdm.checkpoint import latest, list_checkpoints, load_weights
from vdm.config import load
from vdm.data.mini_something import write_ssv2
from vdm.errors import CannotWrite, Failure, UserError
from vdm.training.kinds import build_task
from vdm.training.loop import Loop, train
from vdm.training.signals import SIGNALS, StopRequest
from vdm.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "fixtures" / "tiny.yaml"
Command = Callable[..., Any]


def children(pid: int) -> list[int]:
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def started(run_dir: Path, *overrides: str, steps: int = 3) -> subprocess.Popen[str]:
    """A run in a process group of its own, so many steps on."""
    process = subprocess.Popen(
        [sys.executable, "train.py", str(TINY), f"run_dir={run_dir}", *overrides],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    log = run_dir / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= steps):
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_to_the_bit(
    number: signal.Signals, to_all: bool, tmp_path: Path
) -> None:
    """Whether the signal comes to the run alone or, as from a batch system or a keyboard, to its workers too."""
    write_ssv2(tmp_path / "clips", num_clips=20, size=24, num_frames=8, fps=8, seed=0)
    common = (
        "data.format=ssv2", f"data.root={tmp_path / 'clips'}", "data.num_clips=null", "data.dataloader_num_workers=2",
        "training.max_train_steps=60", "training.checkpointing_steps=1000", "training.validation_steps=0",
    )  # fmt: skip
    run_dir = tmp_path / "run"
    process = started(run_dir, *common)
    workers = children(process.pid)
    (os.killpg if to_all else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    [kept] = list_checkpoints(run_dir)
    step = int(kept.name.removeprefix("checkpoint-"))
    assert 3 <= step < 60
    assert f"stopped after step {step} ({number.name}): {kept}; the same command with --resume latest goes on" in out
    assert f"{number.name}: the run ends with a checkpoint after this step" in err and "Traceback" not in err
    assert len(workers) >= 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not (run_dir / "final").exists()

    final = train(load(TINY, [f"run_dir={run_dir}", *common]), resume="latest")
    whole = train(load(TINY, [f"run_dir={tmp_path / 'whole'}", *common]))
    for part in ("unet", "text", "vae"):
        assert (final / f"{part}.safetensors").read_bytes() == (whole / f"{part}.safetensors").read_bytes()


def test_a_second_signal_ends_it_at_once() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert stop.name is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_stopping_after_so_many_steps(command: Command, tmp_path: Path) -> None:
    done = command("train.py", TINY, f"run_dir={tmp_path}", "training.stop_after_steps=7")
    kept = tmp_path / "checkpoint-7"
    assert done.code == 0
    assert f"stopped after step 7 (training.stop_after_steps=7): {kept}; the same command" in done.out
    assert latest(tmp_path) == kept
    assert command("train.py", TINY, f"run_dir={tmp_path}", "--resume", "latest").code == 0
    assert (tmp_path / "final").is_dir()


def test_a_branch_does_not_mix_with_the_run_that_it_is_of(tmp_path: Path) -> None:
    """Which of its checkpoints are whose, nobody could tell."""
    common = ["training.checkpointing_steps=4", "training.validation_steps=0", "training.stop_after_steps=6"]
    train(load(TINY, [*common, f"run_dir={tmp_path / 'run'}"]))
    start = str(tmp_path / "run" / "checkpoint-4")
    before = sorted((tmp_path / "run").iterdir())
    with pytest.raises(UserError, match=r"holds later checkpoints than .*checkpoint-4 \(checkpoint-6\); go"):
        train(load(TINY, [*common, f"run_dir={tmp_path / 'run'}"]), resume=start)
    assert sorted((tmp_path / "run").iterdir()) == before
    train(load(TINY, [*common, f"run_dir={tmp_path / 'branch'}"]), resume=start)
    assert latest(tmp_path / "branch") == tmp_path / "branch" / "checkpoint-6"


def test_a_damaged_log_is_no_reason_not_to_resume(tmp_path: Path) -> None:
    common = [f"run_dir={tmp_path}", "training.checkpointing_steps=2", "training.validation_steps=0"]
    train(load(TINY, [*common, "training.stop_after_steps=2"]))
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'{"a": 1}\n[]\n\xff\xfe\n{"step": "x"}\n{"step": 1, "lo')
    train(load(TINY, [*common, "training.stop_after_steps=3"]), resume="latest")
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_run_does_not_go_back_behind_its_end(tmp_path: Path) -> None:
    common = [f"run_dir={tmp_path}", "training.validation_steps=0", "training.stop_after_steps=5"]
    train(load(TINY, common))
    with pytest.raises(UserError, match="checkpoint-5 is beyond the 4 steps of this run; raise training.max_train_st"):
        train(load(TINY, [*common, "training.max_train_steps=4"]), resume="latest")


def test_the_best_checkpoint_has_a_loss() -> None:
    losses = {1: 0.3, 2: float("nan"), 3: 0.2, 4: 0.2, 5: float("inf")}
    infos = {step: {"val_loss": loss} for step, loss in losses.items()} | {6: {}, 7: {}}
    assert checkpoint.Retention(newest=1, best="val_loss").keeps(infos) == {4, 7}


@pytest.fixture
def no_room() -> Iterator[Callable[[int], None]]:
    """no_room(n): no file of this process may be larger than n bytes, until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(count: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (count if count >= 0 else soft, hard))

    yield limit
    limit(-1)


@pytest.mark.parametrize("in_background", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_a_full_disk_costs_checkpoints_and_only_after_three_of_them_the_run(
    tmp_path: Path, no_room: Callable[[int], None], capsys: pytest.CaptureFixture[str], in_background: str
) -> None:
    common = [
        f"run_dir={tmp_path}",
        f"training.save_in_background={in_background}",
        "training.checkpointing_steps=2",
        "training.validation_steps=5",
    ]
    train(load(TINY, [*common, "training.stop_after_steps=2"]))
    before = (tmp_path / "checkpoint-2" / "unet.safetensors").read_bytes()
    capsys.readouterr()
    no_room(20_000)
    with pytest.raises(Failure, match="checkpoint-8 cannot be written: .*free space there"):
        train(load(TINY, common), resume="latest")
    no_room(-1)
    told = capsys.readouterr().err
    assert told.count("cannot be written") == 2 and "what was there still is, and the run goes on" in told
    assert (tmp_path / "checkpoint-2" / "unet.safetensors").read_bytes() == before
    assert latest(tmp_path) == tmp_path / "checkpoint-2"
    assert [path.name for path in tmp_path.iterdir() if ".tmp" in path.name] == []
    train(load(TINY, common), resume="latest")
    assert (tmp_path / "final").is_dir()


def test_a_disk_that_is_full_at_the_very_end_is_no_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the finished model is written from the last checkpoint once there is room."""
    common = [f"run_dir={tmp_path}", "training.max_train_steps=2", "training.checkpointing_steps=2"]

    def full(*_: object, **__: object) -> None:
        raise CannotWrite("final cannot be written: no space left on device; free space there")

    with monkeypatch.context() as patch:
        patch.setattr("vdm.training.task.save_parts", full)
        with pytest.raises(Failure, match="no space left .*--resume latest writes it from the last checkpoint"):
            train(load(TINY, common))
    assert train(load(TINY, common), resume="latest") == tmp_path / "final"


def test_a_disk_that_has_room_again_is_used_again(
    tmp_path: Path, no_room: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Trainer.save
    tries: list[int] = []

    def sometimes(self: Trainer) -> None:
        tries.append(self.step)
        no_room(20_000 if len(tries) in (2, 3, 5, 6) else -1)
        try:
            save(self)
        finally:
            no_room(-1)

    monkeypatch.setattr(Trainer, "save", sometimes)
    overrides = ["training.checkpointing_steps=1", "training.max_train_steps=7", "training.validation_steps=0"]
    train(load(TINY, [f"run_dir={tmp_path}", *overrides]))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4", "checkpoint-7"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_log_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, no_room: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(TINY, [f"run_dir={tmp_path}", "training.max_train_steps=4", "training.validation_steps=0"])
    trainer = Trainer(config, build_task(config, torch.device("cpu")), tmp_path)
    loop = Loop(trainer)
    trainer.save = lambda: None  # type: ignore[method-assign]
    trainer.finish = lambda: tmp_path  # type: ignore[method-assign]
    no_room(1000)  # room for a line or two
    loop.run()
    no_room(-1)
    assert "cannot be written" in capsys.readouterr().err
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["step"] == 1


def test_verify_resume(command: Command, tmp_path: Path) -> None:
    more = ("model.dropout=0.3", "training.gradient_accumulation_steps=2", "data.horizontal_flip=0.5")
    done = command("train.py", TINY, f"run_dir={tmp_path / 'run'}", *more, "--verify-resume")
    assert done.code == 0 and "3 steps, a restart and 3 more are 6 steps, bit for bit" in done.out
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    assert "leave --resume out" in command("train.py", TINY, "--verify_resume", "--resume", "latest").error


def test_verify_resume_can_fail(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restore = Trainer.restore

    def forgetful(self: Trainer, path: Path) -> None:
        restore(self, path)
        self.optimizer.state.clear()

    monkeypatch.setattr(Trainer, "restore", forgetful)
    done = command("train.py", TINY, f"run_dir={tmp_path / 'run'}", "--verify_resume")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("error: after 6 steps with a restart amid them ")
    assert list(tmp_path.iterdir()) == []


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    overrides = (
        "training.checkpointing_steps=2", "training.validation_steps=2", "training.keep_checkpoints=2",
        "training.keep_every=8", "training.keep_best=true",
    )  # fmt: skip
    train(load(TINY, [f"run_dir={tmp_path}", *overrides]))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    best = min((line["val_loss"], -line["step"]) for line in log if "val_loss" in line)
    kept = {int(path.name.removeprefix("checkpoint-")) for path in list_checkpoints(tmp_path)}
    assert kept == {18, 20, 8, 16, -best[1]}
    assert checkpoint.read_manifest(tmp_path / "checkpoint-20").info["val_loss"] == pytest.approx(log[-1]["val_loss"])


@pytest.mark.slow
def test_killed_many_times_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    """At any instant, also while it saves, which it does after every step."""
    common = ("training.max_train_steps=40", "training.checkpointing_steps=1", "training.keep_checkpoints=2",
              "training.validation_steps=7", "model.dropout=0.2")  # fmt: skip
    whole = train(load(TINY, [f"run_dir={tmp_path / 'whole'}", *common]))
    run_dir = tmp_path / "run"
    rng = torch.Generator().manual_seed(0)
    for number in range(20):
        before = len(list_checkpoints(run_dir)) and int(list_checkpoints(run_dir)[-1].name.removeprefix("checkpoint-"))
        if before >= 34 and number >= 8:  # on a fast machine, whose next kill might come after the end
            break
        resume = ("--resume", "latest")
        with subprocess.Popen(
            [sys.executable, "train.py", str(TINY), f"run_dir={run_dir}", *common, *resume],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            while process.poll() is None:
                now = list_checkpoints(run_dir)
                if now and int(now[-1].name.removeprefix("checkpoint-")) > before:
                    break
                time.sleep(0.002)
            time.sleep(float(torch.rand((), generator=rng)) * 0.15)
            process.send_signal(signal.SIGKILL)
            shown = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, (number, shown)
    final = train(load(TINY, [f"run_dir={run_dir}", *common]), resume="latest")
    for part in ("unet", "text"):
        ours, theirs = load_weights(final, part), load_weights(whole, part)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    losses = [
        [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (run_dir, tmp_path / "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 40
