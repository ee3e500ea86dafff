"""A checkpoint is there in full or not at all, and says in one sentence what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vdm import __version__, checkpoint
from vdm.checkpoint import (
    Manifest,
    Retention,
    RunLock,
    latest,
    list_checkpoints,
    load_trainer_state,
    load_weights,
    prune,
    save_checkpoint,
    verify,
)
from vdm.errors import UserError

UNET = {"conv.weight": torch.arange(24.0).reshape(2, 3, 4), "steps": torch.tensor(3, dtype=torch.int64)}


State = dict[str, object]


def save(path: Path, *, step: int = 1, unet: dict[str, Tensor] = UNET, trainer: State | None = None) -> Path:
    halves = {name: tensor.half() for name, tensor in unet.items()}
    weights = {"unet": unet, "unet.ema": halves}
    save_checkpoint(path, config_yaml="name: caf\u00e9\n", weights=weights, trainer_state=trainer, info={"step": step})
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def edit_manifest(path: Path, **changes: object) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = {"step": 7, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}}
    path = save(tmp_path / "new" / "checkpoint-7", step=7, trainer=state)

    manifest = verify(path)
    assert manifest.info["step"] == 7
    assert set(manifest.parts) == {"unet", "unet.ema"}
    assert manifest.vdm_version == __version__
    assert names(path) == {"manifest.json", "config.yaml", "trainer.pt", "unet.safetensors", "unet.ema.safetensors"}
    assert set(manifest.files) == names(path) - {"manifest.json"}
    assert (path / "config.yaml").read_text(encoding="utf-8") == "name: caf\u00e9\n"
    loaded = load_weights(path, "unet")
    assert loaded.keys() == UNET.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in UNET.items())
    assert all(loaded[name].dtype == tensor.dtype for name, tensor in UNET.items())
    assert load_weights(path, "unet.ema")["conv.weight"].dtype == torch.float16
    restored = load_trainer_state(path)
    assert restored["step"] == 7
    assert torch.equal(restored["optimizer"]["state"][0]["exp_avg"], torch.ones(2))
    assert names(tmp_path / "new") == {"checkpoint-7"}


def test_shared_and_strided_tensors_are_saved_as_they_are(tmp_path: Path) -> None:
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = {
        "whole": base,
        "again": base,
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "row": base[2],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "channels_last": channels_last,
        "empty": torch.zeros(0, 3),
    }
    loaded = load_weights(save(tmp_path / "c", unet=tensors), "unet")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_saving_again_replaces(tmp_path: Path) -> None:
    save(tmp_path / "final", step=1, trainer={"step": 1})
    save(tmp_path / "final", step=2)
    assert verify(tmp_path / "final").info["step"] == 2
    assert names(tmp_path) == {"final"}
    assert "trainer.pt" not in names(tmp_path / "final")


def test_a_half_written_or_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoint-1")
    (path / "manifest.json").unlink()
    save(path)
    assert verify(path).info["step"] == 1
    (tmp_path / "empty").mkdir()
    verify(save(tmp_path / "empty"))


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_bytes(b"dear")
    with pytest.raises(UserError, match="holiday exists and is not a checkpoint; choose another folder"):
        save(tmp_path / "holiday")
    (tmp_path / "file").write_bytes(b"dear")
    with pytest.raises(UserError, match="file exists and is not a checkpoint"):
        save(tmp_path / "file")
    assert names(tmp_path) == {"holiday", "file"}
    assert (tmp_path / "holiday" / "photo.jpg").read_bytes() == b"dear"


class DiskFull:
    """Stands in for a function of the operating system; refuses from its n-th call on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, *, after: int):
        self.real, self.left, self.calls = getattr(owner, name), after, 0
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: self(*args, **kwargs))

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.calls += 1
        if self.calls > self.left:
            raise OSError(28, "No space left on device")
        return self.real(*args, **kwargs)


@pytest.mark.parametrize(
    ("owner", "function", "after"),
    [
        (Path, "mkdir", 0),
        (checkpoint, "write_safetensors", 0),
        (checkpoint, "write_safetensors", 1),
        (torch, "save", 0),
        (Path, "write_text", 0),
        (Path, "write_text", 1),
        (os, "fsync", 0),
        (os, "fsync", 5),
        (Path, "rename", 0),
    ],
)
def test_a_failed_save_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, function: str, after: int
) -> None:
    path = save(tmp_path / "checkpoint-1", step=1, trainer={"step": 1})
    with monkeypatch.context() as patch:
        DiskFull(patch, owner, function, after=after)
        with pytest.raises(UserError, match="checkpoint-1 cannot be written: .*No space left.*; free space"):
            save(path, step=2, trainer={"step": 2})
    assert verify(path).info["step"] == 1
    assert names(tmp_path) == {"checkpoint-1"}


def test_a_failed_first_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DiskFull(monkeypatch, torch, "save", after=0)
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path / "checkpoint-1", trainer={"step": 1})
    assert names(tmp_path) == set()


def test_a_failed_last_rename_brings_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "final", step=1)
    rename = Path.rename

    def refuse_final(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_final)
    with pytest.raises(UserError, match="Input/output error"):
        save(path, step=2)
    assert verify(path).info["step"] == 1
    assert names(tmp_path) == {"final"}


def test_an_interrupted_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "final", step=1)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_safetensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(path, step=2)
    assert verify(path).info["step"] == 1
    assert names(tmp_path) == {"final"}


LIMITED = """
import resource, sys, torch
from vdm.checkpoint import save_checkpoint
from vdm.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
big, small = {"w": torch.zeros(100_000)}, {"w": torch.zeros(10)}
weights, state = (big, small) if sys.argv[2] == "weights" else (small, big)
try:
    save_checkpoint(sys.argv[1], config_yaml="", weights={"unet": weights}, trainer_state=state, info={"step": 2})
except UserError as error:
    sys.exit(f"said: {error}")
"""


@pytest.mark.parametrize("what", ["weights", "trainer state"])
def test_a_real_refusal_of_the_operating_system(tmp_path: Path, what: str) -> None:
    path = save(tmp_path / "final", step=1)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path), what], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"said: checkpoint {path} cannot be written: "), done.stderr
    assert verify(path).info["step"] == 1
    assert names(tmp_path) == {"final"}


def break_not_a_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def break_hash(path: Path) -> None:
    file = path / "unet.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def break_size(path: Path) -> None:
    (path / "unet.safetensors").write_bytes(b"short")


def break_into_folder(path: Path) -> None:
    (path / "unet.safetensors").unlink()
    (path / "unet.safetensors").mkdir()


BREAKAGES = [
    (shutil.rmtree, "checkpoint .*c does not exist"),
    (break_not_a_folder, "checkpoint .*c is not a folder"),
    (lambda path: (path / "manifest.json").unlink(), "no manifest.json: it is no checkpoint, or was not written to"),
    (lambda path: (path / "manifest.json").write_text('{"format_ver'), "manifest.json is damaged; copy"),
    (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
    (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    (lambda path: (path / "manifest.json").write_text("{}"), "manifest.json is damaged"),
    (lambda path: edit_manifest(path, files={"unet.safetensors": {"bytes": 1}}), "manifest.json is damaged"),
    (lambda path: edit_manifest(path, files={"../x": {"bytes": 1, "sha256": ""}}), "manifest.json is damaged"),
    (lambda path: edit_manifest(path, format_version=2, vdm_version="9.1"), "written by vdm 9.1, .*; update vdm"),
    (lambda path: (path / "unet.safetensors").unlink(), "unet.safetensors is missing; copy the checkpoint again"),
    (break_size, "unet.safetensors has 5 bytes instead of [0-9]+; copy"),
    (break_hash, "unet.safetensors is damaged, for its SHA-256 differs"),
]


@pytest.mark.parametrize(("breakage", "sentence"), BREAKAGES)
def test_each_fault_has_its_sentence(tmp_path: Path, breakage: Callable[[Path], object], sentence: str) -> None:
    path = save(tmp_path / "c")
    verify(path)
    breakage(path)
    with pytest.raises(UserError, match=sentence):
        verify(path)
    with pytest.raises(UserError, match=sentence):
        load_weights(path, "unet")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "c")
    (path / "manifest.json").rename(path / "saved.json")
    (path / "manifest.json").mkdir()
    with pytest.raises(UserError, match="manifest.json cannot be read: Is a directory"):
        verify(path)
    (path / "manifest.json").rmdir()
    (path / "saved.json").rename(path / "manifest.json")
    break_into_folder(path)
    size = (path / "unet.safetensors").stat().st_size
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["unet.safetensors"]["bytes"] = size
    edit_manifest(path, files=manifest["files"])
    with pytest.raises(UserError, match="unet.safetensors cannot be read: Is a directory"):
        verify(path)


def test_what_a_checkpoint_does_not_hold(tmp_path: Path) -> None:
    path = save(tmp_path / "c")
    with pytest.raises(UserError, match=r"c holds no weights of vae, only of unet(\.ema)?, unet(\.ema)?$"):
        load_weights(path, "vae")
    with pytest.raises(UserError, match="holds no trainer state, so no run can resume from it"):
        load_trainer_state(path)
    assert Manifest(1, "0", {}, {}).parts == []


def test_trainer_state_cannot_carry_code(tmp_path: Path) -> None:
    path = save(tmp_path / "c", trainer={"path": Path("x")})
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_trainer_state(path)


def test_latest_is_the_newest_valid_one_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert latest(tmp_path / "nowhere") is None
    for step in (9, 10, 100):
        save(tmp_path / f"checkpoint-{step}", step=step)
    save(tmp_path / "final")
    save(tmp_path / "checkpoint-last")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert latest(tmp_path) == tmp_path / "checkpoint-100"
    assert capsys.readouterr().err == ""
    break_hash(tmp_path / "checkpoint-100")
    assert latest(tmp_path) == tmp_path / "checkpoint-10"
    assert capsys.readouterr().err.startswith("warning: passing over checkpoint-100: ")
    (tmp_path / "checkpoint-10" / "manifest.json").unlink()
    (tmp_path / "checkpoint-9" / "manifest.json").unlink()
    assert latest(tmp_path) is None


@pytest.mark.parametrize(("keep", "left"), [(None, [1, 2, 3]), (5, [1, 2, 3]), (3, [1, 2, 3]), (2, [2, 3]), (1, [3])])
def test_prune_keeps_the_newest(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    for step in (1, 2, 3):
        save(tmp_path / f"checkpoint-{step}")
    save(tmp_path / "final")
    (tmp_path / "checkpoint-4").mkdir()  # not complete: neither counted nor deleted
    prune(tmp_path, retention=Retention(newest=keep), until=3)
    assert names(tmp_path) == {"final", "checkpoint-4", *(f"checkpoint-{step}" for step in left)}


def test_prune_does_not_count_what_a_run_has_passed_over(tmp_path: Path) -> None:
    """A damaged checkpoint of a later step is not newer than the one that was just written."""
    for step in (5, 7, 10):
        save(tmp_path / f"checkpoint-{step}")
    break_hash(tmp_path / "checkpoint-10")
    prune(tmp_path, retention=Retention(newest=1), until=7)
    assert names(tmp_path) == {"checkpoint-7", "checkpoint-10"}


HOLD = """
import sys, time
from vdm.checkpoint import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_is_refused_to_others_and_dies_with_its_process(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="demo is in use by another process; wait for it to end or choose another"):
            RunLock(run)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with RunLock(run), pytest.raises(UserError, match="in use"):
        RunLock(run)
    lock = RunLock(run)
    lock.release()
    lock.release()
    RunLock(run).release()


FORK = """
import os, sys, time
from vdm.checkpoint import RunLock
lock = RunLock(sys.argv[1])
read, write = os.pipe()
child = os.fork()
if child == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
os.read(read, 1)
"""


def test_a_data_worker_does_not_keep_the_lock_of_its_killed_trainer(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", FORK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives
        RunLock(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.stdout.close()


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run folder .*/run cannot be written: Not a directory; choose another run_dir"):
        RunLock(tmp_path / "file" / "run")


def test_the_lock_clears_what_a_killed_process_left(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-2")
    half = tmp_path / ".checkpoint-3.tmp-123"
    half.mkdir()
    (half / "unet.safetensors").write_bytes(b"half")
    save(tmp_path / "final", step=1).rename(tmp_path / ".final.old-123")  # killed between the two renames
    save(tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.old-123")  # killed before the deletion
    save(tmp_path / "checkpoint-2")
    with RunLock(tmp_path):
        assert names(tmp_path) == {".lock", "checkpoint-2", "final"}
        assert verify(tmp_path / "final").info["step"] == 1


def test_the_order_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is written after all other files, and nothing bears the final name before it."""
    written: list[str] = []
    write_text = Path.write_text

    def note(self: Path, *args: object, **kwargs: object) -> int:
        written.append(self.name)
        assert not (tmp_path / "c").exists()
        assert self.name != "manifest.json" or len(names(self.parent)) == 3
        return write_text(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint.Path, "write_text", note)
    save(tmp_path / "c")
    assert written == ["config.yaml", "manifest.json"]
