"""Checkpoints that are written while training goes on: the same files, of the moment when they were asked for."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vdm.checkpoint import latest, load_trainer_state, load_weights, save_checkpoint
from vdm.config import load
from vdm.errors import CannotWrite, Failure
from vdm.training import saving
from vdm.training.loop import train
from vdm.training.saving import Contents, Writer
from vdm.training.trainer import Trainer
from vdm.training.verify import differences

TINY = Path(__file__).parents[1] / "fixtures" / "tiny.yaml"


class Disk:
    """A disk that takes its time: `save_checkpoint`, held up until `ready` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ready = threading.Event()
        monkeypatch.setattr(saving, "save_checkpoint", self.save)

    def save(self, path: Path, **contents: Any) -> None:
        assert self.ready.wait(timeout=30)
        save_checkpoint(path, **contents)


def start(writer: Writer, path: Path, weight: Tensor, state: Mapping[str, Any]) -> None:
    writer.start(path, Contents("name: x\n", {"unet": {"w": weight}}, state, {"step": 1}))


def test_what_is_written_is_what_was_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk, writer = Disk(monkeypatch), Writer(in_background=True)
    weight, moments = torch.zeros(3), {"moments": [torch.zeros(3)]}
    start(writer, tmp_path / "checkpoint-1", weight, moments)
    assert writer.written(wait=False) is None, "it is not there yet"
    weight += 1.0  # the next step
    moments["moments"][0] += 1.0
    disk.ready.set()
    assert writer.written(wait=True) == tmp_path / "checkpoint-1"
    assert writer.written(wait=True) is None, "it is told once"
    assert load_weights(tmp_path / "checkpoint-1", "unet")["w"].tolist() == [0, 0, 0]
    assert load_trainer_state(tmp_path / "checkpoint-1")["moments"][0].tolist() == [0, 0, 0]


def test_a_disk_that_refuses_is_told_when_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = Writer(in_background=True)
    start(writer, tmp_path / "file" / "checkpoint-1", torch.zeros(3), {})
    with pytest.raises(CannotWrite, match="cannot be written"):
        writer.written(wait=True)
    start(writer, tmp_path / "checkpoint-2", torch.zeros(3), {})
    assert writer.written(wait=True) == tmp_path / "checkpoint-2"


def test_what_is_being_written_is_there_once_the_writer_is_closed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk, writer = Disk(monkeypatch), Writer(in_background=True)
    start(writer, tmp_path / "checkpoint-1", torch.zeros(3), {})
    threading.Timer(0.2, disk.ready.set).start()
    writer.close()
    assert load_weights(tmp_path / "checkpoint-1", "unet")["w"].tolist() == [0, 0, 0]


def test_a_run_that_fails_first_waits_for_its_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = Disk(monkeypatch)

    def fail(self: Trainer, micro_batches: object) -> dict[str, float]:
        threading.Timer(0.2, disk.ready.set).start()
        raise Failure("a process has died")

    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, b: (fail if self.step == 2 else step)(self, b))
    flags = ["training.checkpointing_steps=2", "training.validation_steps=0", "training.save_in_background=true"]
    with pytest.raises(Failure, match="a process has died"):
        train(load(TINY, [*flags, f"run_dir={tmp_path}"]))
    assert latest(tmp_path) == tmp_path / "checkpoint-2"


def test_a_run_that_stops_at_a_checkpoint_writes_it_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: list[str] = []

    def save(path: Path, **contents: Any) -> None:
        written.append(path.name)
        save_checkpoint(path, **contents)

    monkeypatch.setattr(saving, "save_checkpoint", save)
    flags = ["training.checkpointing_steps=2", "training.stop_after_steps=4", "training.validation_steps=0"]
    assert train(load(TINY, [*flags, "training.save_in_background=true", f"run_dir={tmp_path}"])).name == "checkpoint-4"
    assert written == ["checkpoint-2", "checkpoint-4"]


def test_a_run_that_writes_in_the_background_writes_the_same(tmp_path: Path) -> None:
    common = ["training.max_train_steps=8", "training.checkpointing_steps=2", "training.validation_steps=4"]
    for name, more in {"at once": ["false"], "background": ["true"]}.items():
        flags = [f"training.save_in_background={more[0]}", "training.keep_checkpoints=2"]
        train(load(TINY, [*common, *flags, f"run_dir={tmp_path / name}"]))
    for name in ("checkpoint-6", "checkpoint-8", "final"):
        assert list(differences(tmp_path / "at once" / name, tmp_path / "background" / name)) == []
    assert not (tmp_path / "background" / "checkpoint-4").exists()
