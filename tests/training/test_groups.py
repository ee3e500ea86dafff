"""Which layers are temporal, rates of their own, and what is frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vdm.checkpoint import load_trainer_state, load_weights
from vdm.config import Config, load
from vdm.errors import UserError
from vdm.models import UNet3D, UNetConfig, VAEConfig, VideoVAE
from vdm.training.groups import choose_what_learns, is_temporal, optimizer_groups
from vdm.training.kinds import build_task, warn_of_random_parts
from vdm.training.loop import train
from vdm.training.settings import TrainingConfig
from vdm.training.trainer import Trainer

TINY = Path(__file__).parents[1] / "fixtures" / "tiny.yaml"
SHAPE = load(TINY).model
SLOWLY = pytest.mark.slow


def tiny(run_dir: Path, *overrides: str) -> Config:
    return load(TINY, [f"run_dir={run_dir}", "training.validation_steps=0", *overrides])


def trainer_of(run_dir: Path, *overrides: str) -> Trainer:
    config = tiny(run_dir, *overrides)
    return Trainer(config, build_task(config, torch.device("cpu")), run_dir)


def values(trainer: Trainer) -> dict[str, Tensor]:
    return {f"{part}.{n}": p.detach().clone() for part, m in trainer.trained.items() for n, p in m.named_parameters()}


def temporal(name: str) -> bool:
    """Of a parameter `part.name`."""
    return is_temporal(name.partition(".")[2])


def step(trainer: Trainer) -> dict[str, float]:
    return trainer.train_step([next(trainer.train_batches())])


# ---- what is temporal


def test_temporal_layers_are_those_that_an_image_model_lacks() -> None:
    video, image = UNet3D(SHAPE), UNet3D(UNetConfig(**{**vars(SHAPE), "model_type": "spatial"}))
    names = {name for name, _ in video.named_parameters()}
    assert {name for name in names if is_temporal(name)} == names - {name for name, _ in image.named_parameters()}


def test_temporal_layers_of_an_autoencoder() -> None:
    shape = vars(load(TINY).vae)
    plain = {name for name, _ in VideoVAE(VAEConfig(**{**shape, "temporal_decoder": False})).named_parameters()}
    whole = {name for name, _ in VideoVAE(VAEConfig(**{**shape, "temporal_decoder": True})).named_parameters()}
    assert {name for name in whole if is_temporal(name)} == whole - plain != set()


def test_temporal_layers_alone_see_other_frames() -> None:
    """An oracle without names: where the gradient of one frame's output by another frame's input flows through."""
    torch.manual_seed(0)
    unet = UNet3D(SHAPE).eval()
    with torch.no_grad():
        for name, p in unet.named_parameters():
            p.copy_(0.1 * torch.randn(p.shape))
            if is_temporal(name) and p.ndim > 1 and any(last in name for last in ("convs.1", "proj_out")):
                p.zero_()  # the temporal branches add nothing
    z = torch.randn(1, 4, 3, 4, 4, requires_grad=True)
    out = unet(z, torch.tensor([5]), torch.randn(1, 3, 16))[0, :, 0]
    (gradient,) = torch.autograd.grad(out.sum(), z)
    others = gradient[0, :, 1:].abs().max()
    assert gradient[0, :, 0].abs().max() > 0 and float(others) == 0.0


# ---- rates


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=SLOWLY)])
def test_every_group_steps_at_its_rate(tmp_path: Path, optimizer: str) -> None:
    plain = trainer_of(tmp_path, f"training.optimizer={optimizer}")
    trainer = trainer_of(
        tmp_path, f"training.optimizer={optimizer}", "temporal_learning_rate=1e-3", "text_learning_rate=2e-4"
    )
    before, logged, reference = values(trainer), step(trainer), step(plain)
    assert logged["loss"] == reference["loss"] and logged["grad_norm"] == reference["grad_norm"]
    assert "lr_spatial" not in logged and reference.keys() == logged.keys() - {"lr_temporal", "lr_text"}
    assert logged["lr"] == reference["lr"]
    assert logged["lr_temporal"] == pytest.approx(logged["lr"] / 5) and logged["lr_text"] == pytest.approx(
        logged["lr"] / 25
    )
    ours, theirs = values(trainer), values(plain)
    for name, start in before.items():  # a first step is in proportion to its rate
        share = 1 / 25 if name.startswith("text.") else 1 / 5 if temporal(name) else 1.0
        torch.testing.assert_close(ours[name] - start, share * (theirs[name] - start), rtol=2e-2, atol=2e-6)


def test_without_rates_of_their_own_all_are_one_group(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    (group,) = trainer.optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in trainer.parameters]
    same = trainer_of(tmp_path, "spatial_learning_rate=5e-3", "temporal_learning_rate=5e-3")
    first, second = step(trainer), step(same)
    assert first == second, "a rate that is the same is nothing to log"
    assert all(torch.equal(p, q) for p, q in zip(trainer.parameters, same.parameters, strict=True))


def test_groups_part_the_parameters_that_learn() -> None:
    modules = {"unet": UNet3D(SHAPE), "text": nn.Linear(2, 2), "contrast": nn.Linear(2, 2)}
    config = TrainingConfig(spatial_learning_rate=1e-5, temporal_learning_rate=0.0, text_learning_rate=3e-5)
    choose_what_learns(modules, config)
    groups = {group.name: group for group in optimizer_groups(modules, config)}
    assert {name: group.rate for name, group in groups.items()} == {"spatial": 1e-5, "text": 3e-5, "": 1e-4}
    assert set(groups["text"].parameters) == {"text.weight", "text.bias"}
    assert set(groups[""].parameters) == {"contrast.weight", "contrast.bias"}
    names = {f"unet.{name}" for name, _ in modules["unet"].named_parameters() if not is_temporal(name)}
    assert set(groups["spatial"].parameters) == names


# ---- frozen layers


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=SLOWLY)])
def test_frozen_layers_neither_change_nor_cost_memory(tmp_path: Path, optimizer: str) -> None:
    trainer = trainer_of(tmp_path, f"training.optimizer={optimizer}", "spatial_learning_rate=0")
    before = values(trainer)
    first = step(trainer)
    for _ in range(2):
        step(trainer)
    after, learns = values(trainer), {}
    for name in before:
        learns[name] = name.startswith("text.") or temporal(name)
        assert learns[name] or torch.equal(before[name], after[name]), name
    assert any(not torch.equal(before[n], after[n]) for n in before if learns[n])
    with_state = {id(p) for p in trainer.optimizer.state}
    for part, module in trainer.trained.items():
        for name, p in module.named_parameters():
            full = f"{part}.{name}"
            assert p.requires_grad is learns[full] is (name in trainer.ema.shadow[part])
            assert (id(p) in with_state) <= learns[full], "moments only of what learns"
    assert sum(p.numel() for p in trainer.parameters) == sum(before[n].numel() for n in before if learns[n])
    assert first["grad_norm"] > 0


def test_a_frozen_text_tower_is_one_that_is_not_trained(tmp_path: Path) -> None:
    frozen, untrained = (
        trainer_of(tmp_path, override) for override in ("text_learning_rate=0", "text.text_trainable=false")
    )
    assert frozen.trained.keys() == untrained.trained.keys() == {"unet"}
    assert step(frozen) == step(untrained)


def test_a_frozen_tower_without_weights_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_random_parts(load(TINY, ["text_learning_rate=0"]))
    assert "text.text_weights is null" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("text_learning_rate=1e-5", "text.text_trainable=false"), "text_learning_rate is set, but this run trains no"),
        (("temporal_learning_rate=1e-5", "model.model_type=spatial"), "temporal_learning_rate is set, but this run"),
        (("training.task=vae", "temporal_learning_rate=1e-5"), "temporal_learning_rate is set, but this run trains no"),
        (
            ("spatial_learning_rate=0", "temporal_learning_rate=0", "text.text_trainable=false"),
            "every layer is frozen; set one of the training",
        ),
        (("training.min_learning_rate=1",), "min_learning_rate=1.0 is above training.learning_rate=0.005"),
        (("spatial_learning_rate=-1",), "spatial_learning_rate must be at least 0"),
    ],
)
def test_rates_that_make_no_sense_are_refused(tmp_path: Path, overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        trainer_of(tmp_path, *overrides)
    assert "\n" not in str(caught.value)


# ---- resume


@SLOWLY
def test_a_run_with_frozen_layers_resumes_bit_for_bit_and_no_other_way(tmp_path: Path) -> None:
    overrides = ("spatial_learning_rate=0", "temporal_learning_rate=2e-3", "max_train_steps=4", "checkpointing_steps=2")
    train(tiny(tmp_path / "whole", *overrides))
    train(tiny(tmp_path / "halves", *overrides, "training.stop_after_steps=2"))
    train(tiny(tmp_path / "halves", *overrides), resume="latest")
    for part in ("unet", "unet.ema", "text", "text.ema"):
        ours, theirs = (load_weights(tmp_path / run / "checkpoint-4", part) for run in ("halves", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    names = load_trainer_state(tmp_path / "whole" / "checkpoint-4")["learns"]
    assert names and all(name.startswith("text.") or temporal(name) for name in names)
    for other in (("spatial_learning_rate=1e-3",), ("spatial_learning_rate=0", "temporal_learning_rate=0")):
        with pytest.raises(UserError, match="of a run in which other layers are frozen .*training.init_from"):
            train(tiny(tmp_path / "other", *other), resume=str(tmp_path / "whole" / "checkpoint-4"))


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=SLOWLY), "muon"])
def test_rates_may_change_between_halves_and_moments_stay_with_their_parameters(tmp_path: Path, optimizer: str) -> None:
    """Other rates make other groups in another order."""
    plain = trainer_of(tmp_path, f"training.optimizer={optimizer}")
    for _ in range(2):
        step(plain)
    plain.save()
    other = trainer_of(tmp_path, f"training.optimizer={optimizer}", "temporal_learning_rate=1e-3")
    other.restore(tmp_path / "checkpoint-2")
    names = {id(p): n for part, m in plain.trained.items() for n, p in m.named_parameters(prefix=part)}
    theirs = {names[id(p)]: state for p, state in plain.optimizer.state.items()}
    names = {id(p): n for part, m in other.trained.items() for n, p in m.named_parameters(prefix=part)}
    assert len(other.optimizer.state) == len(theirs)
    for p, state in other.optimizer.state.items():
        for key, moment in state.items():
            assert torch.equal(moment, theirs[names[id(p)]][key]), (names[id(p)], key)
    assert {group["rate"] for group in other.optimizer.param_groups} == {5e-3, 1e-3}
