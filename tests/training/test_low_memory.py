"""Runs that save memory: what they write, that they go on bit for bit, and what cannot go together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vdm.checkpoint import load_trainer_state, load_weights
from vdm.config import Config, load
from vdm.errors import UserError
from vdm.pipeline import TextToVideo
from vdm.training.kinds import build_task
from vdm.training.loop import train
from vdm.training.state import _moment
from vdm.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "fixtures" / "tiny.yaml"
BF16 = ("training.weights_dtype=bf16", "training.mixed_precision=bf16")
SMALLEST = (
    *BF16,
    "training.optimizer_states=8bit",
    "training.optimizer_in_backward=true",
    "training.ema_offload=true",
    "training.gradient_checkpointing=cheap",
)


def tiny(run_dir: Path, *overrides: str) -> Config:
    quick = ("training.max_train_steps=2", "training.validation_steps=2", "training.checkpointing_steps=2")
    return load(TINY, [f"run_dir={run_dir}", *quick, *overrides])


def trainer_of(run_dir: Path, *overrides: str) -> Trainer:
    config = tiny(run_dir, *overrides)
    trainer = Trainer(config, build_task(config, torch.device("cpu")), run_dir)
    for module in trainer.trained.values():
        module.train()
    return trainer


def test_a_run_with_all_of_it_writes_float32_averages_and_goes_on(tmp_path: Path) -> None:
    final = train(tiny(tmp_path, *SMALLEST))
    last = tmp_path / "checkpoint-2"
    own, averages = (dict(load_weights(last, part)) for part in ("unet", "unet.ema"))
    assert {t.dtype for t in own.values()} == {torch.bfloat16}
    assert {t.dtype for t in averages.values()} == {torch.float32}
    finished = dict(load_weights(final, "unet"))
    assert all(torch.equal(averages[name], tensor) for name, tensor in finished.items()), "not rounded"
    assert any(not torch.equal(t, t.bfloat16().float()) for t in finished.values())
    TextToVideo.from_pretrained(final)
    kept = load_trainer_state(last)
    assert {"exp_avg_scale", "exp_avg_sq_scale"} <= set().union(*kept["optimizer"]["state"].values())
    assert kept["in_backward"]["last_norm"] > 0.0
    with pytest.raises(UserError, match=r"may not change: training.optimizer_states \(8bit -> fp32\)"):
        train(tiny(tmp_path, *BF16, "training.max_train_steps=4"), resume="latest")


def test_a_run_may_go_on_with_updates_within_the_backward_pass(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    train(tiny(tmp_path, "training.max_train_steps=4", "training.optimizer_in_backward=true"), resume="latest")
    assert load_trainer_state(tmp_path / "checkpoint-4")["in_backward"]["last_norm"] > 0.0


def test_a_run_in_float16_goes_on_from_one_that_was_not(tmp_path: Path) -> None:
    """Its scaler, which only a GPU has work for, begins as a new one does."""
    train(tiny(tmp_path))
    trainer = trainer_of(tmp_path)
    trainer.scaler = torch.amp.GradScaler("cpu")
    trainer.restore(tmp_path / "checkpoint-2")
    assert trainer.step == 2 and trainer.scaler.get_scale() == 65536.0


def test_a_moment_lies_in_memory_as_its_weight_does() -> None:
    """Fused optimizers take both as they lie; processes that share weights out write other orders."""
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    value = torch.arange(48.0).reshape(4, 3, 2, 2)
    ours = _moment(value, like=weight)
    assert ours.stride() == weight.stride() != value.stride() and torch.equal(ours, value)
    assert not ours.requires_grad
    step = torch.tensor(3.0)
    assert _moment(step, like=weight) is step


@pytest.mark.slow
def test_the_smallest_run_learns_as_the_usual_one_does(tmp_path: Path) -> None:
    still = ("training.learning_rate=1e-12", "training.weight_decay=0")
    runs = [trainer_of(tmp_path, *overrides, "training.max_grad_norm=1e6") for overrides in ((), SMALLEST, still)]
    losses = []
    for trainer in runs:
        stream = trainer.train_batches()
        losses.append([trainer.train_step([next(stream)])["loss"] for _ in range(4)])
        stream.close()
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert abs(losses[2][-1] - losses[0][-1]) > 2 * abs(losses[1][-1] - losses[0][-1]), "they have learned"


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        SMALLEST,
        (*BF16, "training.optimizer_states=bf16", "training.ema_offload=true"),
        ("training.optimizer_in_backward=true", "training.gradient_checkpointing=block", "training.max_grad_norm=0.01"),
        ("training.optimizer_states=8bit", "training.gradient_accumulation_steps=2"),
    ],
)
def test_runs_go_on_bit_for_bit(command: Callable[..., Any], tmp_path: Path, overrides: tuple[str, ...]) -> None:
    done = command("train.py", TINY, f"run_dir={tmp_path / 'run'}", *overrides, "--verify_resume")
    assert done.code == 0, done.err
    assert "bit for bit" in done.out


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (BF16[:1], "training.mixed_precision=bf16"),
        ((*BF16, "training.optimizer=muon"), "training.weights_dtype=bf16 is for AdamW"),
        (("training.optimizer_states=8bit", "training.optimizer=muon"), "training.optimizer_states=8bit is for AdamW"),
        (("training.optimizer_in_backward=true", "training.optimizer=muon"), "set training.optimizer=adamw"),
        (("training.optimizer_in_backward=true", "training.gradient_accumulation_steps=2"), "accumulation_steps=1"),
        (("training.optimizer_in_backward=true", "training.mixed_precision=fp16"), "mixed_precision=bf16"),
        (("training.optimizer_in_backward=true", "training.num_gpus=2"), "training.num_gpus=1"),
    ],
)
def test_what_cannot_go_together(tmp_path: Path, overrides: tuple[str, ...], remedy: str) -> None:
    with pytest.raises(UserError) as error:
        tiny(tmp_path, *overrides)
    assert remedy in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_loads(path: Path) -> None:
    assert load(path).name == path.stem


def test_24gb_is_the_reference_recipe_but_for_its_memory() -> None:
    small, whole = (load(ROOT / "configs" / f"{name}.yaml") for name in ("24gb", "a100"))
    assert (small.model, small.vae, small.text, small.diffusion) == (
        whole.model,
        whole.vae,
        whole.text,
        whole.diffusion,
    )
    assert small.data.max_frames == 24 and small.data.cache_dir is not None
    for key in ("learning_rate", "effective_batch_size", "max_train_steps", "weight_decay", "adam_beta2"):
        assert getattr(small.training, key) == getattr(whole.training, key)
