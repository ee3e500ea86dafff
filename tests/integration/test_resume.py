"""A run that was stopped goes on as if it had never been: the same weights and the same log, bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vdm.checkpoint import load_trainer_state, load_weights, read_manifest
from vdm.components import build_vae, save_parts, states
from vdm.config import Config, load
from vdm.errors import UserError
from vdm.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "fixtures" / "tiny.yaml"
HALVES = ("training.max_train_steps=8", "training.checkpointing_steps=4", "training.validation_steps=4")


def tiny(run_dir: Path, *overrides: str) -> Config:
    return load(TINY, [f"run_dir={run_dir}", *HALVES, *overrides])


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same_checkpoint(left: Path, right: Path) -> None:
    """All weights and all of the optimizer's state, bit for bit."""
    assert read_manifest(left).parts == read_manifest(right).parts
    for part in read_manifest(left).parts:
        ours, theirs = load_weights(left, part), load_weights(right, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), part
    if "trainer.pt" in read_manifest(left).files:
        assert_same(load_trainer_state(left), load_trainer_state(right))


def assert_same(left: object, right: object) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict) and isinstance(right, dict):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert_same(value, right[key])
    elif isinstance(left, Tensor) and isinstance(right, Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


# ---- killed


def killed_after(step: int, run_dir: Path) -> None:
    """Train in a process of its own, and kill that as soon as the checkpoint of this step is there."""
    arguments = [sys.executable, "train.py", str(TINY), f"run_dir={run_dir}"]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not (run_dir / f"checkpoint-{step}" / "manifest.json").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        _, shown = process.communicate()
    assert process.returncode == -signal.SIGKILL, shown


@pytest.mark.slow
def test_killed_after_step_10_and_resumed_a_20_step_run_ends_with_the_same_weights(
    command: Callable[..., Any], shell: Callable[..., Any], finished_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    killed_after(10, run_dir)
    assert not (run_dir / "final").exists()
    refused = command("train.py", TINY, f"run_dir={run_dir}")
    assert "already holds checkpoints" in refused.error and "--resume latest" in refused.error

    resumed = shell("train.py", TINY, f"run_dir={run_dir}", "--resume", "latest")
    assert resumed.code == 0, resumed
    assert f"resuming from {run_dir / 'checkpoint-10'}" in resumed.out
    for name in ("final", "checkpoint-20"):
        assert_same_checkpoint(run_dir / name, finished_run / name)
    for part in ("unet", "vae", "text"):
        ours, theirs = (folder / "final" / f"{part}.safetensors" for folder in (run_dir, finished_run))
        assert ours.read_bytes() == theirs.read_bytes()
    assert [record["step"] for record in records(run_dir)] == list(range(1, 21))
    assert [record["loss"] for record in records(run_dir)] == [record["loss"] for record in records(finished_run)]
    assert not [path.name for path in run_dir.iterdir() if ".tmp-" in path.name or ".old-" in path.name]


# ---- stopped in other ways, in this process


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """whole(*overrides): the folder of an uninterrupted run of 8 steps with a checkpoint after 4; each is made once."""
    runs: dict[tuple[str, ...], Path] = {}

    def whole(*overrides: str) -> Path:
        if overrides not in runs:
            runs[overrides] = tmp_path_factory.mktemp("run") / "run"
            train(tiny(runs[overrides], *overrides))
        return runs[overrides]

    return whole


def first_half(run_dir: Path, copy: Path) -> Path:
    """A run folder as a process that was killed after step 4 leaves it behind."""
    copy.mkdir()
    shutil.copytree(run_dir / "checkpoint-4", copy / "checkpoint-4")
    shutil.copy(run_dir / "log.jsonl", copy)  # it was killed after step 6, say, which counts for nothing
    return copy


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.dropout=0.3", "training.caption_dropout=0.5", "training.gradient_accumulation_steps=2"),
        ("data.cache_latents=true", "data.min_frames=2", "text.text_trainable=false"),
        ("data.min_frames=2", "training.mixed_precision=bf16", "training.gradient_checkpointing=true"),
        ("training.task=vae", "training.edge_weight=0.5"),
        ("training.task=text", "training.optimizer=muon", "data.cache_latents=true"),
    ],
    ids=["text tower", "dropout and accumulation", "cached latents", "bf16 and recomputed", "vae", "text alone, muon"],
)
def test_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_does(
    whole: Callable[..., Path], tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    reference = whole(*overrides)
    run_dir = first_half(reference, tmp_path / "run")
    torch.manual_seed(99)  # another process, another state of the global generator
    train(tiny(run_dir, *overrides), resume="latest")
    assert_same_checkpoint(run_dir / "checkpoint-8", reference / "checkpoint-8")
    assert_same_checkpoint(run_dir / "final", reference / "final")
    ours, theirs = records(run_dir), records(reference)
    assert [record["step"] for record in ours] == list(range(1, 9))
    assert [record["loss"] for record in ours] == [record["loss"] for record in theirs]
    assert ours[7]["val_loss"] == theirs[7]["val_loss"]


def test_a_checkpoint_by_path_continues_in_another_folder(whole: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "elsewhere"
    train(tiny(run_dir), resume=str(whole() / "checkpoint-4"))
    assert_same_checkpoint(run_dir / "final", whole() / "final")


def test_a_finished_run_is_not_trained_again(whole: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole(), run_dir)
    train(tiny(run_dir), resume="latest")
    assert_same_checkpoint(run_dir / "final", whole() / "final")
    train(tiny(run_dir, "training.max_train_steps=9"), resume="latest")
    assert read_manifest(run_dir / "final").info["step"] == 9


def test_settings_may_change_between_halves(whole: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = first_half(whole(), tmp_path / "run")
    train(tiny(run_dir, "training.weight_decay=0.5", "training.adam_beta1=0.8"), resume="latest")
    (group,) = load_trainer_state(run_dir / "checkpoint-8")["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.8, 0.999))
    assert load(run_dir / "config.yaml").training.weight_decay == 0.5


def test_latest_without_a_checkpoint_starts_afresh_and_says_so(
    whole: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "checkpoint-4").mkdir(parents=True)  # cut short: it has no manifest
    train(tiny(run_dir), resume="latest")
    shown = capsys.readouterr()
    assert f"no checkpoint in {run_dir} yet: starting afresh" in shown.out
    assert "passing over checkpoint-4" in shown.err
    assert_same_checkpoint(run_dir / "final", whole() / "final")


def test_latest_does_not_start_afresh_where_checkpoints_cannot_be_read(
    whole: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(whole() / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "unet.safetensors").write_bytes(b"damaged")
    (tmp_path / "log.jsonl").write_text('{"step": 4}\n', encoding="utf-8")
    with pytest.raises(UserError, match="none of the checkpoints in .* can be read; mend them, or move them away"):
        train(tiny(tmp_path), resume="latest")
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == '{"step": 4}\n'


@pytest.mark.parametrize("left", ["checkpoint-4", "final"])
def test_a_folder_with_checkpoints_is_refused_unless_resumed(
    whole: Callable[..., Path], tmp_path: Path, left: str
) -> None:
    shutil.copytree(whole() / left, tmp_path / left)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="already holds checkpoints; .*--resume latest"):
        train(tiny(tmp_path))
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != ".lock"] == before


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("training.task=vae",), r"may not change: training.task \(unet -> vae\)"),
        (("text.text_trainable=false",), r"may not change: text.text_trainable \(true -> false\)"),
        (
            ("training.optimizer=muon", "training.learning_rate=1e-3"),
            r"training.optimizer \(adamw -> muon\); training.learning_rate \(0.005 -> 0.001\) may differ; set .* back",
        ),
        (("model.channel_mult=[1, 3]",), r"model.channel_mult \(\(1, 2\) -> \(1, 3\)\)"),
        (("text.text_width=32", "model.context_dim=32"), r"model.context_dim \(16 -> 32\), text.text_width"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    whole: Callable[..., Path], tmp_path: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        train(tiny(tmp_path, *overrides), resume=str(whole() / "checkpoint-4"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "config.yaml").exists()


def test_settings_that_may_differ_are_named_when_a_run_resumes(
    whole: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(tmp_path, "training.learning_rate=1e-3", "training.batch_size=1"), resume=str(whole() / "checkpoint-4"))
    shown = capsys.readouterr().out
    assert "training.learning_rate (0.005 -> 0.001)" in shown and "training.batch_size (2 -> 1)" in shown
    assert "other clips or draws from here on" in shown and "run_dir" not in shown


def test_a_checkpoint_of_another_version_is_refused(whole: Callable[..., Path], tmp_path: Path) -> None:
    old = tmp_path / "old" / "checkpoint-4"
    shutil.copytree(whole() / "checkpoint-4", old)
    text = (old / "config.yaml").read_text(encoding="utf-8").replace("unet_dim", "unet_width")
    (old / "config.yaml").write_text(text, encoding="utf-8")
    manifest = json.loads((old / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["config.yaml"] = {
        "bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }  # fmt: skip
    (old / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match="made by another version of vdm, for its unknown key model.unet_width"):
        train(tiny(tmp_path / "run"), resume=str(old))


def test_a_finished_model_is_no_checkpoint_to_resume_from(whole: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no trainer state"):
        train(tiny(tmp_path), resume=str(whole() / "final"))
    with pytest.raises(UserError, match="does not exist"):
        train(tiny(tmp_path), resume=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("fate", ["another", "gone"])
def test_a_resumed_run_takes_frozen_parts_from_its_checkpoint(tmp_path: Path, fate: str) -> None:
    """Whatever became of the folder that they were first read from."""
    source, run_dir = tmp_path / "vae", tmp_path / "run"
    weights = f"vae.vae_weights={source}"
    save_parts(source, tiny(source), states({"vae": build_vae(tiny(source, "seed=1"))}))
    train(tiny(run_dir, weights, "training.max_train_steps=4"))
    before = (run_dir / "checkpoint-4" / "vae.safetensors").read_bytes()
    shutil.rmtree(source)
    if fate == "another":
        save_parts(source, tiny(source), states({"vae": build_vae(tiny(source, "seed=2"))}))
    train(tiny(run_dir, weights), resume="latest")
    assert (run_dir / "final" / "vae.safetensors").read_bytes() == before
    assert load(run_dir / "config.yaml").vae.vae_weights == str(source), "the record of the run stays what it was"
