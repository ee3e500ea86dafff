"""The log of a run, also of one that was cut short and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vdm.training.preview import write_preview
from vdm.training.runlog import RunLog


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def write(run_dir: Path, first: int, last: int, *, loss: float = 1.0) -> None:
    log = RunLog(run_dir, first_step=first, num_steps=20)
    for step in range(first + 1, last + 1):
        log.write(step, {"loss": loss / step, "lr": 1e-4})
        log.advance(loss / step, 1e-4, num_steps=20)
    log.close()


def test_one_object_a_line_with_all_digits_that_matter(tmp_path: Path) -> None:
    log = RunLog(tmp_path, first_step=0, num_steps=2)
    log.write(1, {"loss": 0.123456789123, "lr": 1e-6})
    assert records(tmp_path) == [{"step": 1, "loss": 0.12345679, "lr": 1e-6}], "it is on the disk at once"
    log.close()


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    write(tmp_path, 0, 3)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"loss", "lr"}
    events = board.Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3]
    assert [event.value for event in events] == pytest.approx([1.0, 1 / 2, 1 / 3])


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    write(tmp_path, 0, 7)
    write(tmp_path, 4, 9, loss=2.0)
    log = records(tmp_path)
    assert [record["step"] for record in log] == list(range(1, 10))
    assert [record["loss"] * record["step"] for record in log] == pytest.approx([1.0] * 4 + [2.0] * 5, rel=1e-5)


def test_a_run_that_starts_afresh_forgets_all(tmp_path: Path) -> None:
    write(tmp_path, 0, 3)
    write(tmp_path, 0, 1)
    assert [record["step"] for record in records(tmp_path)] == [1]


@pytest.mark.parametrize("cut", ['{"step": 3, "lo', '{"step": 3, "loss": 0.3', "{", "\x00\x00\x00"])
def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path, cut: str) -> None:
    write(tmp_path, 0, 2)
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(cut)
    write(tmp_path, 2, 4)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]


def test_a_whole_line_without_its_line_end_is_kept(tmp_path: Path) -> None:
    write(tmp_path, 0, 2)
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    write(tmp_path, 2, 3)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


def test_the_bar_shows_loss_progress_and_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, first_step=3, num_steps=20)
    log.advance(0.25, 2e-4, num_steps=12)
    log.say("half way there")
    log.close()
    shown = capsys.readouterr().err
    assert "half way there\n" in shown
    assert "4/12" in shown and "loss=0.2500, lr=2.0e-04" in shown


def test_tensorboard_shows_the_sheet_of_a_preview(tmp_path: Path) -> None:
    folder = tmp_path / "preview"
    write_preview(folder, torch.zeros(1, 3, 2, 16, 16), captions=["grey"], fps=8.0)
    log = RunLog(tmp_path, first_step=0, num_steps=2)
    log.show(1, folder)
    log.show(2, tmp_path / "nowhere")
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = board.Images("previews")
    shown = cv2.imdecode(np.frombuffer(event.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    assert event.step == 1 and np.array_equal(shown, cv2.imread(str(folder / "contact_sheet.png")))
