"""One step, what a run writes, and how it goes on: gradients, validation, checkpoints, resume, the golden loss."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vdm.checkpoint import list_checkpoints, load_trainer_state, load_weights, read_manifest
from vdm.config import Config, load
from vdm.errors import UserError
from vdm.pipeline import TextToVideo
from vdm.training.loop import Trainer, train
from vdm.training.optim import learning_rate
from vdm.training.task import build_task

FIXTURES = Path(__file__).parents[1] / "fixtures"
STILL = ("model.temporal_dropout=0", "training.caption_dropout=0")  # no dropout of any kind


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
    stream = trainer._batches()
    values = trainer.train_step([next(stream) for _ in range(trainer.settings.gradient_accumulation_steps)])
    handle.remove()
    return values, seen


def norm_of(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- one step


def test_accumulated_micro_batches_are_one_large_batch(tmp_path: Path) -> None:
    sizes = ((4, 1), (2, 2), (1, 4))
    results = [
        step(trainer_of(tmp_path, *STILL, f"training.batch_size={size}", f"gradient_accumulation_steps={times}"))
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


def test_dropout_is_drawn_from_seed_and_step(tmp_path: Path) -> None:
    overrides = ("model.dropout=0.5", "model.temporal_dropout=0.5")
    losses = []
    for noise in (1, 2):
        trainer = trainer_of(tmp_path, *overrides)
        torch.manual_seed(noise)  # whatever else the process does
        losses.append([step(trainer)[0]["loss"] for _ in range(2)])
    assert losses[0] == losses[1]
    other = trainer_of(tmp_path, *overrides)
    other.step = 5
    batch = next(trainer_of(tmp_path, *overrides)._batches())
    assert other.train_step([batch])["loss"] != losses[0][0], "another step, another mask"


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_are_touched(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    batch = next(trainer._batches())
    batch.video.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        trainer.train_step([batch])
    assert trainer.step == 0
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.parameters, strict=True))


def test_bfloat16_trains_with_weights_in_float32(tmp_path: Path) -> None:
    exact, _ = step(trainer_of(tmp_path))
    low, gradients = step(trainer_of(tmp_path, "training.mixed_precision=bf16"))
    assert low["loss"] != exact["loss"] and low["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


def test_gradient_checkpointing_changes_no_number(tmp_path: Path) -> None:
    plain, gradients = step(trainer_of(tmp_path, "model.dropout=0.2"))
    saved, same = step(trainer_of(tmp_path, "model.dropout=0.2", "training.gradient_checkpointing=true"))
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
    assert [record["step"] for record in log] == [1, 3, 4, 6, 7]
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
    assert read_manifest(final).info == read_manifest(last).info == {"step": 3, "task": "unet"}
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


# ---- going on


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """whole(*overrides): the folder of an uninterrupted run of 8 steps with a checkpoint after 4; each is made once."""
    runs: dict[tuple[str, ...], Path] = {}

    def whole(*overrides: str) -> Path:
        if overrides not in runs:
            runs[overrides] = tmp_path_factory.mktemp("run") / "run"
            train(tiny(runs[overrides], *HALVES, *overrides))
        return runs[overrides]

    return whole


HALVES = ("training.max_train_steps=8", "training.checkpointing_steps=4", "training.validation_steps=4")


def first_half(run_dir: Path, copy: Path) -> Path:
    """A run folder as a process that was killed after step 4 leaves it behind."""
    copy.mkdir()
    shutil.copytree(run_dir / "checkpoint-4", copy / "checkpoint-4")
    shutil.copy(run_dir / "log.jsonl", copy)  # it was killed after step 6, say, which counts for nothing
    return copy


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


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.dropout=0.3", "training.caption_dropout=0.5", "training.gradient_accumulation_steps=2"),
        ("data.cache_latents=true", "data.min_frames=2", "text.text_trainable=false"),
        ("data.min_frames=2", "training.mixed_precision=bf16", "training.gradient_checkpointing=true"),
        ("training.task=vae", "training.edge_weight=0.5"),
    ],
    ids=["text tower", "dropout and accumulation", "cached latents", "bf16 and recomputed", "vae"],
)
def test_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_does(
    whole: Callable[..., Path], tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    reference = whole(*overrides)
    run_dir = first_half(reference, tmp_path / "run")
    torch.manual_seed(99)  # another process, another state of the global generator
    train(tiny(run_dir, *HALVES, *overrides), resume="latest")
    assert_same_checkpoint(run_dir / "checkpoint-8", reference / "checkpoint-8")
    assert_same_checkpoint(run_dir / "final", reference / "final")
    ours, theirs = records(run_dir), records(reference)
    assert [record["step"] for record in ours] == list(range(1, 9))
    assert [record["loss"] for record in ours] == [record["loss"] for record in theirs]
    assert ours[7]["val_loss"] == theirs[7]["val_loss"]


def test_a_checkpoint_by_path_continues_in_another_folder(whole: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "elsewhere"
    train(tiny(run_dir, *HALVES), resume=str(whole() / "checkpoint-4"))
    assert_same_checkpoint(run_dir / "final", whole() / "final")


def test_a_finished_run_is_not_trained_again(whole: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole(), run_dir)
    train(tiny(run_dir, *HALVES), resume="latest")
    assert_same_checkpoint(run_dir / "final", whole() / "final")
    train(tiny(run_dir, *HALVES, "training.max_train_steps=9"), resume="latest")
    assert read_manifest(run_dir / "final").info["step"] == 9


def test_settings_may_change_between_halves(whole: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = first_half(whole(), tmp_path / "run")
    train(tiny(run_dir, *HALVES, "training.weight_decay=0.5", "training.adam_beta1=0.8"), resume="latest")
    (group,) = load_trainer_state(run_dir / "checkpoint-8")["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.8, 0.999))
    assert load(run_dir / "config.yaml").training.weight_decay == 0.5


def test_latest_without_a_checkpoint_starts_afresh_and_says_so(
    whole: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "checkpoint-4").mkdir(parents=True)  # cut short: it has no manifest
    train(tiny(run_dir, *HALVES), resume="latest")
    shown = capsys.readouterr()
    assert f"no checkpoint in {run_dir} yet: starting afresh" in shown.out
    assert "passing over checkpoint-4" in shown.err
    assert_same_checkpoint(run_dir / "final", whole() / "final")


@pytest.mark.parametrize("left", ["checkpoint-4", "final"])
def test_a_folder_with_checkpoints_is_refused_unless_resumed(
    whole: Callable[..., Path], tmp_path: Path, left: str
) -> None:
    shutil.copytree(whole() / left, tmp_path / left)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="already holds checkpoints; .*--resume latest"):
        train(tiny(tmp_path, *HALVES))
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != ".lock"] == before


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("training.task=vae",), "of a run with training.task=unet, not vae"),
        (("text.text_trainable=false",), "of a run that trained text, unet"),
        (("model.channel_mult=[1, 3]",), "the unet weights in .* do not fit this config: "),
        (("text.text_width=32", "model.context_dim=32"), "weights in .* do not fit this config: "),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    whole: Callable[..., Path], tmp_path: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        train(tiny(tmp_path, *HALVES, *overrides), resume=str(whole() / "checkpoint-4"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "config.yaml").exists()


def test_a_finished_model_is_no_checkpoint_to_resume_from(whole: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no trainer state"):
        train(tiny(tmp_path, *HALVES), resume=str(whole() / "final"))
    with pytest.raises(UserError, match="does not exist"):
        train(tiny(tmp_path, *HALVES), resume=str(tmp_path / "nowhere"))


