"""Each switch of a recipe changes what it says, and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vdm.checkpoint import load_weights
from vdm.config import Config, load
from vdm.data.loader import Batch
from vdm.diffusion import NoiseSchedule
from vdm.pipeline import TextToVideo
from vdm.training.draws import HELD_OUT
from vdm.training.groups import is_temporal
from vdm.training.kinds import build_task
from vdm.training.loop import train
from vdm.training.task import UNetTask
from vdm.training.trainer import Trainer

TINY = Path(__file__).parents[1] / "fixtures" / "tiny.yaml"
CPU = torch.device("cpu")


def tiny(*overrides: str) -> Config:
    return load(TINY, ["training.batch_size=4", *overrides])


def unet_task(*overrides: str) -> UNetTask:
    task = build_task(tiny(*overrides), CPU)
    assert isinstance(task, UNetTask)
    return task


def batch_of(task: UNetTask, first: int = 0) -> Batch:
    samples = [task.dataset("train")[position] for position in range(first, first + 4)]
    return Batch(
        video=torch.stack([sample["video"] for sample in samples]),
        captions=[sample["caption"] for sample in samples],
        ids=[sample["id"] for sample in samples],
        indices=[sample["index"] for sample in samples],
        positions=[sample["position"] for sample in samples],
        bad=[],
    )


@pytest.fixture(scope="module")
def shared() -> UNetTask:
    return unet_task()


@torch.no_grad()
def seen(shared: UNetTask, *overrides: str, training: bool = True) -> dict[str, Tensor]:
    """All that goes into the loss of one batch, as the UNet sees it; `noise` is what was added, by the schedule."""
    task = copy.copy(shared)  # the same networks under another recipe
    task.config = tiny("training.caption_dropout=0", *overrides)
    task.schedule = NoiseSchedule(task.config.diffusion)
    caught: list[tuple[Tensor, ...]] = []
    handle = task.modules["unet"].register_forward_pre_hook(lambda module, given: caught.append(given))
    batch = batch_of(task)
    loss = task.losses(batch, training=training)["loss"]
    handle.remove()
    noisy, t, context = caught[0]  # the only one of training, the first of those that validation takes
    x0 = task._latents(batch) if training else task._latents(batch, seed=HELD_OUT)
    signal, amplitude = (table[t].reshape(-1, 1, 1, 1, 1) for table in (task.schedule.signal, task.schedule.noise))
    return {"x0": x0, "noise": (noisy - signal * x0) / amplitude, "t": t, "context": context, "loss": loss}


SWITCHES = {
    "training.timestep_sampling=logit_normal": {"t", "loss"},
    "training.offset_noise=0.1": {"noise", "loss"},
    "training.frame_noise_correlation=0.5": {"noise", "loss"},
    "training.caption_dropout=1": {"context", "loss"},
    "diffusion.prediction_type=epsilon": {"loss"},
    "diffusion.prediction_type=x0": {"loss"},
    "diffusion.loss_weighting=min_snr": {"loss"},
    "diffusion.zero_terminal_snr=true": {"loss"},
    "training.lr_scheduler=wsd": set(),
    "training.max_train_hours=1": set(),
    "training.max_train_epochs=1": set(),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_what_it_says_and_nothing_else(shared: UNetTask, switch: str) -> None:
    plain, now = seen(shared), seen(shared, switch)
    # What was added comes out of a division, which for little noise costs a few digits.
    changed = {name for name, value in now.items() if not torch.allclose(value, plain[name], rtol=1e-4, atol=1e-3)}
    assert changed == SWITCHES[switch]


@pytest.mark.parametrize("switch", ["training.offset_noise=0.1", "training.frame_noise_correlation=0.5"])
def test_captions_are_dropped_alike_whatever_the_noise(shared: UNetTask, switch: str) -> None:
    half = "training.caption_dropout=0.5"
    kept, dropped, both = seen(shared), seen(shared, half), seen(shared, half, switch)
    assert torch.equal(both["context"], dropped["context"]) and torch.equal(both["t"], dropped["t"])
    assert not torch.equal(kept["context"], dropped["context"])


def test_validation_is_of_the_noise_that_is_trained(shared: UNetTask) -> None:
    free, tied = (
        seen(shared, f"training.frame_noise_correlation={correlation}", training=False) for correlation in (0, 0.9)
    )
    assert torch.equal(free["t"], tied["t"]) and not torch.allclose(free["noise"], tied["noise"], atol=1e-2)


def test_correlated_noise_is_what_sampling_starts_from(shared: UNetTask) -> None:
    free, tied = (
        TextToVideo(tiny(*overrides), shared.parts) for overrides in ((), ("training.frame_noise_correlation=0.95",))
    )
    with_tied = [pipe._start([torch.Generator().manual_seed(1)], None, (1, 4, 6, 16, 16))[0] for pipe in (free, tied)]
    for noise, low, high in zip(with_tied, (-0.1, 0.9), (0.1, 1.0), strict=True):
        pair = torch.stack([noise[:, 0].flatten(), noise[:, 5].flatten()])
        assert low < float(torch.corrcoef(pair)[0, 1]) < high
    given = torch.randn(1, 4, 6, 16, 16)
    assert torch.equal(tied._start(None, given, (1, 4, 6, 16, 16)), given), "noise that is given is taken as it is"


# ---- images


def test_images_are_trained_by_all_layers_with_one_frame(tmp_path: Path) -> None:
    """Temporal layers run too, and see nothing but the one frame."""
    task = unet_task("data.image_batch_share=1")
    shapes: list[torch.Size] = []
    task.modules["unet"].register_forward_pre_hook(lambda module, given: shapes.append(given[0].shape))
    stir = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.modules["unet"].parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=stir)
    task.losses(batch_of(task), training=True)["loss"].backward()
    assert shapes == [torch.Size([4, 4, 1, 4, 4])]
    for name, parameter in task.modules["unet"].named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("task", ["vae", "text"])
def test_other_tasks_take_images_too(tmp_path: Path, task: str) -> None:
    config = tiny(f"training.task={task}", "data.image_batch_share=1", f"run_dir={tmp_path}")
    trainer = Trainer(config, build_task(config, CPU), tmp_path)
    assert trainer.train_step([next(trainer.train_batches())])["loss"] > 0


def test_a_share_of_images_leaves_the_other_steps_data_alone() -> None:
    """The same latents, noise, times and captions wherever a batch holds clips."""
    plain, mixed = unet_task(), unet_task("data.image_batch_share=0.5")
    kinds = set()
    for number in range(4):
        ours, theirs = batch_of(mixed, 4 * number), batch_of(plain, 4 * number)
        images = ours.video.shape[2] == 1
        kinds.add(images)
        losses = [task.losses(batch, training=True)["loss"].item() for task, batch in ((mixed, ours), (plain, theirs))]
        assert (losses[0] == losses[1]) is not images
    assert kinds == {True, False}


# ---- warm start


@pytest.mark.slow
def test_a_warm_start_with_frozen_spatial_layers_keeps_the_image_model(tmp_path: Path) -> None:
    """The spatial layers of the donor, to the bit, with temporal layers that learned beside them."""
    base = ("training.validation_steps=0", "training.preview_steps=0", "training.batch_size=2")
    donor = train(load(TINY, [*base, f"run_dir={tmp_path / 'donor'}", "max_train_steps=2", "model.model_type=spatial"]))
    warm = (f"training.init_from={donor}", "spatial_learning_rate=0", "max_train_steps=2")
    final = train(load(TINY, [*base, *warm, f"run_dir={tmp_path / 'run'}"]))
    ours, theirs = load_weights(final, "unet"), load_weights(donor, "unet")
    assert {name for name in ours if not is_temporal(name)} == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    fresh: nn.Module = build_task(tiny(), CPU).modules["unet"]
    moved = [not torch.equal(p.detach(), ours[n]) for n, p in fresh.named_parameters() if is_temporal(n)]
    assert any(moved)
