"""`vdm report` of a whole run: every number of its log, every preview, what it was started with."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_the_report_of_a_finished_run(command: Callable[..., Any], finished_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert command("vdm", "report", finished_run, "--output", page).code == 0
    text = page.read_text(encoding="utf-8")
    log = [json.loads(line) for line in (finished_run / "log.jsonl").read_text().splitlines()]
    names = {name for record in log for name in record if name != "step"}
    assert {"grad_norm_temporal", "loss_t3", "val_loss_t3", "data_wait_share", "tflops", "motion_ratio"} <= names
    for name in names:
        last = next(record[name] for record in reversed(log) if name in record)
        assert f"{name} <output>{last:.4g}</output>" in text, name
    assert text.count("<video") == 2, "one prompt, at steps 10 and 20"
    assert "Holding a red ball" in text and "finished, step 20 of 20" in text
    assert f"best val_loss {min(record['val_loss'] for record in log if 'val_loss' in record):.4f}" in text
    (start,) = json.loads((finished_run / "environment.json").read_text())
    assert html.escape(start["command"]) in text and start["command"].startswith("train.py tests/fixtures/tiny.yaml")


def test_a_resumed_run_has_two_starts(command: Callable[..., Any], tmp_path: Path) -> None:
    words = ("tests/fixtures/tiny.yaml", f"run_dir={tmp_path}", "max_train_steps=4", "training.validation_steps=0")
    assert command("train.py", *words, "stop_after_steps=2").code == 0
    assert command("train.py", *words, "--resume", "latest").code == 0
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert [start["step"] for start in starts] == [0, 2]
    assert command("vdm", "report", tmp_path).code == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Earlier starts" in text and all(html.escape(start["command"]) in text for start in starts)
