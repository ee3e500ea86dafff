"""Losses and gradients that are not finite: named, skipped, undone, and in the end handed over for a replay."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vdm.checkpoint import load_weights, read_manifest
from vdm.config import Config, load, to_yaml
from vdm.data.latents import KeptLatents
from vdm.data.loader import Batch
from vdm.training.faults import find_culprits, mean_of_finite, write_bundle
from vdm.training.kinds import build_task
from vdm.training.loop import Loop, train
from vdm.training.replaying import replay
from vdm.training.trainer import Trainer

FIXTURES = Path(__file__).parents[1] / "fixtures"


def tiny(run_dir: Path, *overrides: str) -> Config:
    common = ("data.cache_latents=true", "model.dropout=0.2", "training.validation_steps=0")
    return load(FIXTURES / "tiny.yaml", [f"run_dir={run_dir}", *common, *overrides])


def trainer_of(run_dir: Path, *overrides: str) -> Trainer:
    config = tiny(run_dir, *overrides)
    run_dir.mkdir(exist_ok=True)
    trainer = Trainer(config, build_task(config, torch.device("cpu")), run_dir)
    for module in trainer.trained.values():
        module.train()
    return trainer


def poison(trainer: Trainer, *indices: int, value: float = math.nan) -> None:
    """Put a NaN into the latents of some clips."""
    clips = trainer.clips
    assert isinstance(clips, KeptLatents)
    for index in indices:
        clips.entry(index)
        clips.moments(index, 0, False)[0, 0, 0, 0] = value


def weights(trainer: Trainer) -> dict[str, Tensor]:
    state = {f"{part}.{name}": t.clone() for part, m in trainer.trained.items() for name, t in m.named_parameters()}
    for part, shadow in trainer.ema.shadow.items():
        state |= {f"{part}.ema.{name}": t.clone() for name, t in shadow.items()}
    for number, moments in trainer.optimizer.state_dict()["state"].items():
        state |= {f"{number}.{name}": torch.as_tensor(t).clone() for name, t in moments.items()}
    return state


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize("overrides", [(), ("training.optimizer_in_backward=true",)])
def test_a_nan_in_one_clip_is_named_and_skipped_and_changes_nothing_else(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """Against a run in which somebody passes over that step by hand."""
    ill, well = trainer_of(tmp_path / "ill", *overrides), trainer_of(tmp_path / "well", *overrides)
    said: list[str] = []
    ill.say = said.append
    position = 5  # the second clip of the third step
    index = ill.clips._clip_at(position)
    poison(ill, index)
    streams = ill.train_batches(), well.train_batches()
    for step in range(6):
        batches = [[next(stream)] for stream in streams]
        values = ill.train_step(batches[0])
        if step == 2:
            well.step += 1
        else:
            assert well.train_step(batches[1])["loss"] == values["loss"]
        assert math.isnan(values["loss"]) == (step == 2)
        assert values["skipped_steps"] == (step >= 2)
        assert same(weights(ill), weights(well))
    assert said == [
        f"warning: step 3 is skipped, for the loss is nan: clip {ill.clips.source.id(index)} (position 5), first in "
        "unet.conv_in"
    ]
    assert ill.faults.in_a_row == 0


def test_a_gradient_that_is_not_finite_is_named_and_skipped(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    said: list[str] = []
    trainer.say = said.append
    stream = trainer.train_batches()
    trainer.train_step([next(stream)])
    before = weights(trainer)
    name, parameter = next(iter(trainer.trained["unet"].named_parameters()))
    handle = parameter.register_hook(lambda gradient: gradient * math.inf)
    values = trainer.train_step([next(stream)])
    assert math.isfinite(values["loss"]) and not math.isfinite(values["grad_norm"])
    assert same(weights(trainer), before) and trainer.step == 2
    assert len(said) == 1 and said[0].count(f"first in the gradient of unet.{name}") == 2, "both clips of it"
    handle.remove()
    trainer.train_step([next(stream)])
    assert not same(weights(trainer), before)
    assert all(parameter.grad is None for parameter in trainer.parameters)


def test_the_clip_is_found_in_the_second_micro_batch_too(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "training.gradient_accumulation_steps=2")
    said: list[str] = []
    trainer.say = said.append
    index = trainer.clips._clip_at(3)
    poison(trainer, index, value=math.inf)
    stream = trainer.train_batches()
    trainer.train_step([next(stream), next(stream)])
    assert [line.count("clip ") for line in said] == [1] and "(position 3)" in said[0]


def test_good_clips_are_no_culprits(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    batch = next(trainer.train_batches())

    def gradients_of(one: Batch) -> Tensor:
        loss = trainer._losses(one, training=True)["loss"]
        loss.backward()
        return loss

    assert find_culprits([batch], trainer.task.modules, gradients_of) == []


@pytest.mark.slow
def test_many_in_a_row_go_back_to_the_last_checkpoint_and_then_give_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 6 on every clip is bad: after three the weights are checkpoint-4's, after three more it ends."""
    trainer = trainer_of(tmp_path, "training.max_bad_steps=3", "training.checkpointing_steps=4")
    step_before = trainer.train_step

    def train_step(batches: list[Any]) -> dict[str, float]:
        if trainer.step == 4:
            poison(trainer, *range(16))
        return step_before(batches)

    trainer.train_step = train_step  # type: ignore[method-assign]
    loop = Loop(trainer)
    with pytest.raises(
        FloatingPointError, match=r"^3 steps in a row were not finite, the last for clip .*/replay-11 holds"
    ):
        loop.run()
    assert trainer.step == 10
    assert "back to the weights of checkpoint-4 after 3 such steps in a row" in capsys.readouterr().err
    for part in ("unet", "text"):
        own, averages = (load_weights(tmp_path / "checkpoint-4", f"{part}{end}") for end in ("", ".ema"))
        assert all(torch.equal(p, own[n]) for n, p in trainer.trained[part].named_parameters())
        assert all(torch.equal(t, averages[n]) for n, t in trainer.ema.shadow[part].items())
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] is None for line in log] == [False] * 5 + [True] * 5, "JSON has no NaN"
    assert [line["skipped_steps"] for line in log] == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5]


def test_the_bundle_shows_it_again(tmp_path: Path, command: Callable[..., Any]) -> None:
    trainer = trainer_of(tmp_path, "training.max_bad_steps=1")
    stream = trainer.train_batches()
    trainer.train_step([next(stream)])
    poison(trainer, *range(16))
    with pytest.raises(FloatingPointError, match="1 steps in a row"):
        trainer.train_step([next(stream)])
    bundle = tmp_path / "replay-2"
    [about] = read_manifest(bundle).info["batches"]
    assert about["positions"] == [2, 3] and read_manifest(bundle).info["step"] == 1
    result = command("vdm", "replay", bundle, "--device", "cpu")
    lines = result.out.splitlines()
    assert result.code == 3 and len(lines) == 2
    for line, clip, position in zip(lines, about["ids"], about["positions"], strict=True):
        assert line.startswith(f"clip {clip} (position {position}): loss nan, gradient nan, first in unet.")


def test_a_sound_step_is_computed_again_with_its_own_draws(tmp_path: Path, command: Callable[..., Any]) -> None:
    """Its clips, one by one, have the loss of the step in the mean."""
    trainer = trainer_of(tmp_path)
    stream = trainer.train_batches()
    batches = [next(stream)]
    state = {part: module.state_dict() for part, module in trainer.task.modules.items()}
    write_bundle(tmp_path / "bundle", to_yaml(trainer.config), state, batches, step=0)
    loss = trainer.train_step(batches)["loss"]
    tried = replay(tmp_path / "bundle", device=torch.device("cpu"))
    assert [one.module for one in tried] == ["", ""] and all(one.grad_norm > 0 for one in tried)
    assert sum(one.loss for one in tried) / 2 == pytest.approx(loss, rel=1e-5)
    assert len({one.loss for one in tried}) == 2
    result = command("vdm", "replay", tmp_path / "bundle", "model.dropout=0", "--device", "cpu")
    assert result.code == 0 and result.out.splitlines() != [str(one) for one in tried], "dropout is in force"
    trainer.save()
    for folder, sentence in (
        (tmp_path / "checkpoint-1", "is no replay bundle"),
        (tmp_path / "nowhere", "does not exist"),
    ):
        assert sentence in command("vdm", "replay", folder).error


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    poison(trainer, trainer.clips._clip_at(1))
    trainer.train_step([next(trainer.train_batches())])
    trainer.save()
    other = trainer_of(tmp_path / "other")
    other.restore(tmp_path / "checkpoint-1")
    assert other.faults == trainer.faults and other.faults.skipped == other.faults.in_a_row == 1


def test_the_command_exits_with_1(tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    entry = KeptLatents.entry

    def spoilt(self: KeptLatents, index: int) -> Any:
        found = entry(self, index)
        self.moments(index, 0, False)[0, 0, 0, 0] = math.nan
        return found

    monkeypatch.setattr(KeptLatents, "entry", spoilt)
    done = command("train.py", FIXTURES / "tiny.yaml", "data.cache_latents=true", f"run_dir={tmp_path}")
    assert done.code == 1 and "Traceback" not in done.err
    assert done.err.count("is skipped, for the loss is nan") == 5
    assert done.err.splitlines()[-1].startswith("error: 5 steps in a row were not finite")
    assert (tmp_path / "replay-5" / "manifest.json").is_file() and not (tmp_path / "final").exists()


def test_the_mean_of_losses_leaves_out_what_is_no_number() -> None:
    assert mean_of_finite([1.0, math.nan, 3.0, math.inf]) == 2.0
    assert math.isnan(mean_of_finite([math.nan]))


@pytest.mark.slow
def test_a_run_with_a_skipped_step_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = KeptLatents.entry

    def spoilt(self: KeptLatents, index: int) -> Any:
        found = entry(self, index)
        if index == 3 and self.split == "train":
            self.moments(index, 0, False)[0, 0, 0, 0] = math.nan
        return found

    monkeypatch.setattr(KeptLatents, "entry", spoilt)
    more = ("training.checkpointing_steps=5", "training.max_train_steps=20")
    whole = train(tiny(tmp_path / "whole", *more))
    train(tiny(tmp_path / "halves", *more, "training.stop_after_steps=10"))
    again = train(tiny(tmp_path / "halves", *more), resume="latest")
    ours, theirs = load_weights(again, "unet"), load_weights(whole, "unet")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())
