"""One step and what a run writes: gradients, validation, log, checkpoints, the golden loss."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vdm.checkpoint import list_checkpoints, load_weights, read_manifest
from vdm.config import Config, load
from vdm.errors import UserError
from vdm.models.dropout import clip_seeds
from vdm.pipeline import TextToVideo
from vdm.training.kinds import build_task
from vdm.training.loop import train
from vdm.training.optim import learning_rate
from vdm.training.trainer import Trainer

FIXTURES = Path(__file__).parents[1] / "fixtures"


def tiny(run_dir: Path, *overrides: str) -> Config:
    return load(FIXTURES / "tiny.yaml", [f"run_dir={run_dir}", *overrides])


def trainer_of(run_dir: Path, *overrides: str) -> Trainer:
    config = tiny(run_dir, *overrides)
    trainer = Trainer(config, build_task(config, torch.device("cpu")), run_dir)
    for module in trainer.trained.values():
        module.train()
    return trainer


def step(trainer: Trainer) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The numbers of one step, and the gradients that the optimizer saw."""
    seen: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        for part, module in trainer.trained.items():
            seen.update({f"{part}.{n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})

    handle = trainer.optimizer.register_step_pre_hook(keep)
    stream = trainer.train_batches()
    values = trainer.train_step([next(stream) for _ in range(trainer.settings.gradient_accumulation_steps)])
    handle.remove()
    return values, seen


def norm_of(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def test_a_loss_scaler_changes_no_number_skips_what_overflows_and_is_kept(tmp_path: Path) -> None:
    """As in float16 on a GPU; its scales are powers of two, which float32 holds exactly."""
    plain, scaled = (trainer_of(tmp_path / name, "training.max_grad_norm=0.1") for name in ("plain", "scaled"))
    scaled.scaler = torch.amp.GradScaler("cpu")
    (values, gradients), (same, theirs) = step(plain), step(scaled)
    assert same.pop("loss_scale") == 2.0**16 and "loss_scale" not in values
    assert values == same and all(torch.equal(gradient, theirs[name]) for name, gradient in gradients.items())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters, scaled.parameters, strict=True))
    before = [p.detach().clone() for p in scaled.parameters]
    hook = scaled.parameters[0].register_hook(lambda gradient: gradient + math.inf)
    values, _ = step(scaled)
    hook.remove()
    assert all(torch.equal(p, b) for p, b in zip(scaled.parameters, before, strict=True))
    assert scaled.scaler.get_scale() == 2.0**15 and values["skipped_steps"] == 0, "an overflow is no fault"
    assert values["loss_scale"] == 2.0**15 and scaled.ema.num_updates == 1, "nor are there weights to average"
    scaled.save()
    other = trainer_of(tmp_path / "scaled", "training.max_grad_norm=0.1")
    other.scaler = torch.amp.GradScaler("cpu")
    other.restore(tmp_path / "scaled" / "checkpoint-2")
    assert other.scaler.get_scale() == 2.0**15


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- one step


def test_accumulated_micro_batches_are_one_large_batch(tmp_path: Path) -> None:
    """Dropout of images, of clips and of captions included: each clip has its own draws."""
    sizes, dropout = ((16, 1), (4, 4), (1, 16)), ("model.dropout=0.3", "training.caption_dropout=0.5")
    results = [
        step(trainer_of(tmp_path, *dropout, f"training.batch_size={size}", f"gradient_accumulation_steps={times}"))
        for size, times in sizes
    ]
    (whole, gradients), *others = results
    for values, accumulated in others:
        assert values["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert values["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
        assert accumulated.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(accumulated[name], gradient, rtol=1e-3, atol=1e-6)


def test_gradients_are_clipped_to_the_largest_norm_and_logged_before(tmp_path: Path) -> None:
    free, gradients = step(trainer_of(tmp_path, "training.max_grad_norm=1e6"))
    assert norm_of(gradients) == pytest.approx(free["grad_norm"], rel=1e-4)
    limit = free["grad_norm"] / 10
    clipped, smaller = step(trainer_of(tmp_path, f"training.max_grad_norm={limit}"))
    assert clipped["grad_norm"] == pytest.approx(free["grad_norm"], rel=1e-4)
    assert norm_of(smaller) == pytest.approx(limit, rel=1e-3)
    for name, gradient in gradients.items():
        torch.testing.assert_close(smaller[name] * 10, gradient, rtol=1e-3, atol=1e-6)


def test_a_step_moves_every_trained_part_and_nothing_else(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    before = {part: [p.detach().clone() for p in m.parameters()] for part, m in trainer.task.modules.items()}
    for number in range(2):
        values, _ = step(trainer)
        rate = learning_rate(number, trainer.settings)
        assert values["lr"] == rate
        assert all(group["lr"] == rate for group in trainer.optimizer.param_groups)
    assert trainer.step == trainer.ema.num_updates == 2
    for part, module in trainer.task.modules.items():
        moved = [not torch.equal(old, new) for old, new in zip(before[part], module.parameters(), strict=True)]
        assert any(moved) is (part in ("unet", "text"))
    assert all(parameter.grad is None for parameter in trainer.parameters), "no gradient is left behind"


def test_dropout_is_drawn_from_the_seed_and_the_position_of_a_clip(tmp_path: Path) -> None:
    overrides = ("model.dropout=0.5", "model.temporal_dropout=0.5")
    losses = []
    for noise in (1, 2):
        trainer = trainer_of(tmp_path, *overrides)
        torch.manual_seed(noise)  # whatever else the process does
        losses.append([step(trainer)[0]["loss"] for _ in range(2)])
    assert losses[0] == losses[1]
    other = trainer_of(tmp_path, *overrides)
    batch = next(other.train_batches())
    assert other.train_step([batch])["loss"] == losses[0][0]
    moved = trainer_of(tmp_path, *overrides)
    moved._dropout = lambda batch: clip_seeds([1 + position for position in batch.positions])  # type: ignore
    assert moved.train_step([batch])["loss"] != losses[0][0], "other positions, other masks"


def test_bfloat16_trains_with_weights_in_float32(tmp_path: Path) -> None:
    exact, _ = step(trainer_of(tmp_path))
    low, gradients = step(trainer_of(tmp_path, "training.mixed_precision=bf16"))
    assert low["loss"] != exact["loss"] and low["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


@pytest.mark.parametrize("how", ["true", "cheap"])
def test_gradient_checkpointing_changes_no_number(tmp_path: Path, how: str) -> None:
    plain, gradients = step(trainer_of(tmp_path, "model.dropout=0.2"))
    saved, same = step(trainer_of(tmp_path, "model.dropout=0.2", f"training.gradient_checkpointing={how}"))
    assert plain == saved
    assert all(torch.equal(gradient, same[name]) for name, gradient in gradients.items())


# ---- validation


def test_validation_is_the_same_at_every_call_and_leaves_no_trace(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "model.dropout=0.5")
    step(trainer)
    state, mode = torch.get_rng_state(), trainer.task.modules["unet"].training
    with trainer.ema.applied():
        first = trainer.validate()
        torch.manual_seed(123)
        again = trainer.validate()
    torch.set_rng_state(state)
    assert first == again
    assert trainer.task.modules["unet"].training is mode is True
    step(trainer)
    with trainer.ema.applied():
        assert trainer.validate() != first


def test_validation_is_the_mean_over_clips(tmp_path: Path) -> None:
    """Three clips in batches of two: the odd one counts as much as the others."""
    values = []
    for size in (1, 2, 3):
        trainer = trainer_of(tmp_path, f"training.batch_size={size}")
        with trainer.ema.applied():
            values.append(trainer.validate()["val_loss"])
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


# ---- what a run writes


def test_the_golden_loss(tmp_path: Path) -> None:
    """A refactor keeps the loss. Values move a little with the hardware, and with every change of model or data.

    After a change that is meant, write the new curve: VDM_GOLDEN=1 pytest tests/training/test_loop.py -k golden
    """
    train(tiny(tmp_path / "run"))
    losses = [record["loss"] for record in records(tmp_path / "run")]
    golden = FIXTURES / "golden_loss.json"
    if "VDM_GOLDEN" in os.environ:
        golden.write_text(json.dumps(losses) + "\n", encoding="utf-8")
    assert losses == pytest.approx(json.loads(golden.read_text(encoding="utf-8")), rel=2e-2)


def test_validation_and_loss_share_one_line_a_step(tmp_path: Path) -> None:
    overrides = ("training.max_train_steps=7", "training.log_steps=3", "training.validation_steps=4")
    train(tiny(tmp_path, *overrides, "training.preview_steps=5"))
    log = records(tmp_path)
    assert [record["step"] for record in log] == [1, 3, 4, 5, 6, 7], "a preview has numbers too"
    for record in log:
        assert {"loss", "lr", "grad_norm", "videos_per_second"} <= record.keys()
        assert ("val_loss" in record) is (record["step"] in (4, 7))
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step-000005", "step-000007"}
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-7"]


def test_a_logged_loss_is_the_mean_since_the_last_one(tmp_path: Path) -> None:
    each, third = tmp_path / "each", tmp_path / "third"
    for run_dir, every in ((each, 1), (third, 3)):
        train(tiny(run_dir, f"training.log_steps={every}", "training.max_train_steps=6", "training.validation_steps=0"))
    losses = [record["loss"] for record in records(each)]
    expected = [losses[0], sum(losses[1:3]) / 2, sum(losses[3:6]) / 3]
    assert [record["loss"] for record in records(third)] == pytest.approx(expected, rel=1e-5)
    assert not (each / "samples").exists(), "no validation, no preview"


def test_the_finished_model_is_the_averaged_one(tmp_path: Path) -> None:
    final = train(tiny(tmp_path, "training.max_train_steps=3", "training.checkpointing_steps=1", "keep_checkpoints=2"))
    assert final == tmp_path / "final"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    last = tmp_path / "checkpoint-3"
    averages, own, finished = load_weights(last, "unet.ema"), load_weights(last, "unet"), load_weights(final, "unet")
    assert all(torch.equal(tensor, averages[name]) for name, tensor in finished.items())
    assert any(not torch.equal(tensor, own[name]) for name, tensor in finished.items())
    assert read_manifest(final).info == {"step": 3, "task": "unet"}
    assert read_manifest(last).info == {
        "step": 3,
        "clips_per_step": 2,
        "task": "unet",
        "seconds": pytest.approx(30, abs=30),
        "val_loss": pytest.approx(records(tmp_path)[-1]["val_loss"]),
    }
    sampled = [TextToVideo.from_pretrained(path) for path in (final, last)]
    assert torch.equal(*(pipe.unet.conv_in.weight for pipe in sampled))


def test_a_run_starts_from_the_weights_that_it_is_told(tmp_path: Path) -> None:
    donor = train(tiny(tmp_path / "donor", "training.max_train_steps=2"))
    run_dir = tmp_path / "run"
    train(tiny(run_dir, f"training.init_from={donor}", "training.max_train_steps=1", "training.learning_rate=1e-12"))
    for part in ("unet", "unet.ema"):
        weights, theirs = load_weights(run_dir / "checkpoint-1", part), load_weights(donor, "unet")
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0.0, atol=1e-6)


def test_a_run_says_how_it_differs_from_the_model_that_it_starts_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that fit are not the same network with other groups or heads; other noise is to be unlearned first."""
    donor = train(tiny(tmp_path / "donor", "training.max_train_steps=1"))
    start = (f"training.init_from={donor}", "training.max_train_steps=1")
    for key in ("model.norm_num_groups", "text.text_heads"):
        with pytest.raises(UserError, match=rf"{key} is 2, but .*final was trained with \d; use that"):
            train(tiny(tmp_path / "other", *start, f"{key}=2"))
    capsys.readouterr()
    train(tiny(tmp_path / "noise", *start, "diffusion.prediction_type=epsilon", "diffusion.noise_shift=2"))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "was trained with" in line]
    assert warnings == [
        f"warning: diffusion.prediction_type is 'epsilon', and {donor} was trained with 'v'",
        f"warning: diffusion.noise_shift is 2.0, and {donor} was trained with 1.0",
    ]
    train(tiny(tmp_path / "same", *start))
    assert "was trained with" not in capsys.readouterr().err


def test_previews_are_made_in_the_precision_of_the_run(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "training.mixed_precision=bf16")
    seen = set()
    trainer.task.modules["unet"].conv_in.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    trainer.preview(tmp_path / "preview")
    assert seen == {torch.bfloat16} and list((tmp_path / "preview").glob("*.mp4"))


def test_a_run_says_what_is_ahead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(tmp_path, "training.max_train_steps=2"))
    assert "16 training clips, 2 a step: an epoch is 8.0 steps\n" in capsys.readouterr().err
    train(tiny(tmp_path, "training.max_train_steps=3"), resume="latest")
    assert "an epoch is 8.0 steps; step 2 was in epoch 0.25\n" in capsys.readouterr().err


def test_other_parts_start_from_a_model_too_and_what_is_not_there_is_said(tmp_path: Path) -> None:
    text, vae = (
        train(tiny(tmp_path / task, f"training.task={task}", "training.max_train_steps=1")) for task in ("text", "vae")
    )
    start = ("training.max_train_steps=1", "training.learning_rate=1e-12")
    again = train(tiny(tmp_path / "again", "training.task=text", f"training.init_from={text}", *start))
    for name, tensor in load_weights(again, "text").items():
        torch.testing.assert_close(tensor, load_weights(text, "text")[name], rtol=0.0, atol=1e-6)
    with pytest.raises(UserError, match="vae.vae_norm_num_groups is 2, but .* was trained with 4"):
        more = ("training.task=vae", "vae.vae_norm_num_groups=2")
        train(tiny(tmp_path / "groups", *more, f"training.init_from={vae}", *start))
    with pytest.raises(UserError, match="holds no weights of unet"):
        train(tiny(tmp_path / "none", f"training.init_from={vae}", "model.norm_num_groups=2", *start))
