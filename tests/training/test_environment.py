"""What a run was started with."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

import vdm
from vdm.errors import CannotWrite
from vdm.training import environment
from vdm.training.environment import FILE, commit, read_starts, record_start

CPU = torch.device("cpu")


def test_every_start_is_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "a config.yaml", "seed=3"])
    record_start(tmp_path, step=0, device=CPU)
    record_start(tmp_path, step=7, device=CPU)
    first, second = read_starts(tmp_path)
    assert (first["step"], second["step"]) == (0, 7)
    assert first["command"] == "train.py 'a config.yaml' seed=3"
    assert (first["torch"], first["vdm"]) == (torch.__version__, vdm.__version__)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", str(first["started"]))
    assert [path.name for path in tmp_path.iterdir()] == [FILE], "nothing is left half-written"


@pytest.mark.parametrize("damage", ["", '[{"step": 0}', "null", '{"step": 0}', "\x00"])
def test_a_damaged_file_is_begun_anew(tmp_path: Path, damage: str) -> None:
    (tmp_path / FILE).write_text(damage)
    assert read_starts(tmp_path) == []
    record_start(tmp_path, step=2, device=CPU)
    assert [record["step"] for record in json.loads((tmp_path / FILE).read_text())] == [2]


def test_a_disk_that_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CannotWrite, match="environment.json.*choose another run_dir"):
        record_start(tmp_path / "run", step=0, device=CPU)


def test_the_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkout"
    (root / "vdm").mkdir(parents=True)
    (root / "vdm" / "__init__.py").write_text("")
    monkeypatch.setattr(vdm, "__file__", str(root / "vdm" / "__init__.py"))
    assert commit.__wrapped__() is None, "no checkout"
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "a"], ["tag", "v1"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert commit.__wrapped__() == head
    (root / "vdm" / "__init__.py").write_text("changed")
    assert commit.__wrapped__() == f"{head}-dirty"
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert commit.__wrapped__() is None, "no git"
