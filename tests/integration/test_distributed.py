"""Several processes are one: the same losses, the same checkpoints, and one that dies ends the job."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from vdm.checkpoint import load_trainer_state, load_weights, read_manifest

ROOT = Path(__file__).resolve().parents[2]
# Dropout is on, lengths vary, and 5 validation clips are no multiple of anything.
RUN = (
    "tests/fixtures/tiny.yaml", "data.num_clips=64", "data.min_frames=2", "data.validation_clips=5",
    "training.max_train_steps=6", "training.checkpointing_steps=3", "training.validation_steps=3",
)  # fmt: skip
WAYS = {  # of having 8 clips in a step: processes, and what the config says
    "ddp on 2": (2, "training.batch_size=2", "training.gradient_accumulation_steps=2"),
    "ddp on 4": (4, "training.batch_size=2"),
    "fsdp on 2": (2, "training.batch_size=4", "training.parallel=fsdp", "training.gradient_checkpointing=block"),
    "fsdp on 4": (4, "training.batch_size=1", "training.gradient_accumulation_steps=2", "training.parallel=fsdp"),
}


def torchrun(count: int, *arguments: object, script: str = "train.py", flags: Sequence[str] = ()) -> list[str]:
    """The command that starts so many processes on this machine."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *flags]
    return [*start, script, *map(str, arguments)]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def trained(run_dir: Path, way: tuple[object, ...], *more: str) -> Path:
    """A whole run of so many processes; of one by python alone."""
    count, *overrides = way
    arguments = (*RUN, *overrides, f"run_dir={run_dir}", *more)
    done = run(torchrun(int(str(count)), *arguments) if count != 1 else [sys.executable, "train.py", *arguments])
    assert done.returncode == 0, done.stderr[-20000:]
    assert done.stdout.count("finished: ") == 1, "one process speaks"
    return run_dir


def log(run_dir: Path, name: str) -> list[float]:
    lines = (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("alone") / "run", (1, "training.batch_size=8"))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """together(way): the folder of a run; each is made once."""
    runs: dict[str, Path] = {}

    def together(way: str) -> Path:
        if way not in runs:
            runs[way] = trained(tmp_path_factory.mktemp("together") / "run", WAYS[way])
        return runs[way]

    return together


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_losses_are_those_of_one_process(alone: Path, together: Callable[[str], Path], way: str) -> None:
    run_dir = together(way)
    assert len(log(run_dir, "loss")) == 6
    for name in ("loss", "val_loss"):
        assert log(run_dir, name) == pytest.approx(log(alone, name), rel=1e-5), name
    norms, expected = log(run_dir, "grad_norm"), log(alone, "grad_norm")
    assert norms[0] == pytest.approx(expected[0], rel=1e-5)
    # Later ones are of weights that differ: of a gradient that is mere rounding Adam's first steps make whole steps.
    assert norms == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_does_not_show_how_many_wrote_it(alone: Path, together: Callable[[str], Path], way: str) -> None:
    ours, theirs = together(way) / "checkpoint-3", alone / "checkpoint-3"
    assert read_manifest(ours).parts == read_manifest(theirs).parts
    for part in read_manifest(ours).parts:
        left, right = load_weights(ours, part), load_weights(theirs, part)
        assert {n: (t.shape, t.dtype) for n, t in left.specs.items()} == {
            n: (t.shape, t.dtype) for n, t in right.specs.items()
        }
        for name, tensor in left.items():
            if tensor.is_floating_point():  # of a gradient that is mere rounding Adam makes a whole step, of 5e-3 here
                torch.testing.assert_close(tensor, right[name], rtol=1e-3, atol=2e-3)
            else:  # the tokens seen, in any of the processes
                assert torch.equal(tensor, right[name]), name
    left, right = (load_trainer_state(path)["optimizer"]["state"] for path in (ours, theirs))
    assert left.keys() == right.keys()
    for number, moments in left.items():
        for name, tensor in moments.items():
            torch.testing.assert_close(tensor, right[number][name], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrote", "goes_on"), [("fsdp on 4", 1), ("fsdp on 4", "fsdp on 2"), ("ddp on 4", "fsdp on 4")]
)
def test_saved_by_four_a_run_goes_on_with_any_number(
    alone: Path, together: Callable[[str], Path], tmp_path: Path, wrote: str, goes_on: int | str
) -> None:
    way = (1, "training.batch_size=8") if isinstance(goes_on, int) else WAYS[goes_on]
    start = together(wrote) / "checkpoint-3"
    run_dir = trained(tmp_path / "run", way, "--resume", str(start))
    for name in ("loss", "val_loss"):
        wanted = log(alone, name)
        assert log(run_dir, name) == pytest.approx(wanted[-len(log(run_dir, name)) :], rel=1e-5)
    assert len(log(run_dir, "loss")) == 3


@pytest.mark.slow
def test_a_killed_process_ends_the_job_with_its_reason_and_a_restart_resumes(alone: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    count, *overrides = WAYS["ddp on 2"]
    # A pause in which to kill it: the process itself is the one that knows when.
    script = tmp_path / "fragile.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from vdm.cli import run, train_command\n"
        "from vdm.training.trainer import Trainer\n"
        "step = Trainer.train_step\n"
        "def fragile(self, batches):\n"
        "    if self.step == 4 and os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, batches)\n"
        "Trainer.train_step = fragile\n"
        "sys.exit(run(train_command))\n"
    )
    arguments = (*RUN, *overrides, f"run_dir={run_dir}")
    died = run(torchrun(count, *arguments, script=str(script)))
    assert died.returncode == 1
    assert "Signal 9 (SIGKILL) received" in died.stderr and "has lost another one" in died.stderr
    assert not (run_dir / "final").exists() and (run_dir / "checkpoint-3").exists()

    again = tmp_path / "again"
    flags = ("--max-restarts=1",)
    done = run(torchrun(count, *RUN, *overrides, f"run_dir={again}", script=str(script), flags=flags))
    assert done.returncode == 0, done.stderr[-20000:]
    assert f"resuming from {again / 'checkpoint-3'}" in done.stdout
    assert log(again, "loss") == pytest.approx(log(alone, "loss"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp on 2", "fsdp on 2"])
def test_a_bad_clip_of_one_process_is_named_and_skipped_by_all(tmp_path: Path, way: str) -> None:
    script = tmp_path / "poisoned.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from vdm.cli import run, train_command\n"
        "from vdm.training.task import UNetTask\n"
        "latents = UNetTask._latents\n"
        "def poisoned(self, batch):\n"
        "    z = latents(self, batch)\n"
        "    for number, position in enumerate(batch.positions):\n"
        "        if position == 14:\n"
        "            z[number] = float('nan')\n"
        "    return z\n"
        "UNetTask._latents = poisoned\n"
        "sys.exit(run(train_command))\n"
    )
    count, *overrides = WAYS[way]
    run_dir = tmp_path / "run"
    done = run(
        torchrun(count, *RUN, *overrides, "training.validation_steps=0", f"run_dir={run_dir}", script=str(script))
    )
    assert done.returncode == 0, done.stderr[-20000:]
    told = [line for line in done.stderr.splitlines() if "is skipped" in line]
    assert len(told) == 1 and "step 2 is skipped" in told[0] and told[0].count("(position 14)") == 1, told
    assert log(run_dir, "skipped_steps") == [0, 1, 1, 1, 1, 1]
    assert all(torch.isfinite(tensor).all() for tensor in load_weights(run_dir / "checkpoint-6", "unet").values())


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vae", "text"])
def test_the_other_tasks_in_two_processes(tmp_path: Path, task: str) -> None:
    """The counterexamples of a text tower are those of its micro-step, so the two have it alike."""
    more = (f"training.task={task}", "training.max_train_steps=2", "data.validation_clips=4")
    alone = trained(tmp_path / "alone", (1, "training.batch_size=2", "training.gradient_accumulation_steps=2", *more))
    two = trained(tmp_path / "two", (2, "training.batch_size=2", *more))
    assert log(two, "loss") == pytest.approx(log(alone, "loss"), rel=1e-5)
    assert len(log(two, "loss")) == 2


@pytest.mark.slow
def test_a_run_whose_weights_are_shared_out_begins_from_a_model(alone: Path, tmp_path: Path) -> None:
    more = (f"training.init_from={alone / 'final'}", "training.max_train_steps=2")
    one = trained(tmp_path / "one", (1, "training.batch_size=8", *more))
    two = trained(tmp_path / "two", (*WAYS["fsdp on 2"], *more))
    assert log(two, "loss") == pytest.approx(log(one, "loss"), rel=1e-5)
    assert len(log(two, "loss")) == 2 and log(one, "loss")[0] != log(alone, "loss")[0]


@pytest.mark.slow
def test_a_resume_is_verified_in_two_processes_too(tmp_path: Path) -> None:
    done = run(torchrun(2, *RUN, *WAYS["ddp on 2"][1:], f"run_dir={tmp_path / 'run'}", "--verify_resume"))
    assert done.returncode == 0, done.stderr[-20000:]
    assert done.stdout.count("3 steps, a restart and 3 more are 6 steps, bit for bit") == 1
    assert not list(tmp_path.glob(".verify-resume-*"))


@pytest.mark.slow
def test_told_to_stop_all_of_them_save_and_end(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    count, *overrides = WAYS["fsdp on 2"]
    arguments = (*RUN, *overrides, "training.max_train_steps=500", "training.validation_steps=0", f"run_dir={run_dir}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        torchrun(count, *arguments),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not (run_dir / "checkpoint-3" / "manifest.json").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        shown, errors = process.communicate(timeout=120)
    stopped = re.findall(r"stopped after step (\d+) \(SIGTERM\)", shown)
    assert len(stopped) == 1, errors[-3000:]
    assert (run_dir / f"checkpoint-{stopped[0]}" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("training.num_gpus=1",), "training.num_gpus is 1, but processes are 2"),
        (("data.num_clips=1", "training.batch_size=1"), "there are 1 training clips for 2 processes"),
        (("training.effective_batch_size=2", "training.batch_size=2"), "is 2, but with 2 processes a step has 4 clips"),
        (("training.parallel=fsdp", "training.task=vae"), "set training.parallel=ddp"),
        (("training.batch_size=zwei",), "training.batch_size must be a whole number"),
    ],
)
def test_bad_input_is_said_once(tmp_path: Path, overrides: tuple[str, ...], sentence: str) -> None:
    done = run(torchrun(2, *RUN, *overrides, f"run_dir={tmp_path / 'run'}"))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and sentence in said[0], done.stderr[-20000:]
    assert not list((tmp_path / "run").glob("checkpoint-*"))
