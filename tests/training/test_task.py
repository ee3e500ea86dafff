"""What one step computes: which parts learn, and that a clip's loss is a function of seed and position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
import torch

from vdm.config import Config, load
from vdm.data.latents import KeptLatents
from vdm.data.loader import Batch, batches
from vdm.data.video import read_clip, to_float
from vdm.errors import UserError
from vdm.training.draws import NOISE, POSTERIOR, clip_generator
from vdm.training.kinds import build_task, warn_of_random_parts
from vdm.training.pretraining import TextTask, VAETask
from vdm.training.task import Task, UNetTask

TINY = Path(__file__).parents[1] / "fixtures" / "tiny.yaml"
CPU = torch.device("cpu")


def tiny(*overrides: str) -> Config:
    return load(TINY, overrides)


def unet_task(*overrides: str) -> UNetTask:
    task = build_task(tiny(*overrides), CPU)
    assert isinstance(task, UNetTask)
    stir = torch.Generator().manual_seed(1)  # zero-initialised layers would hide the text and the frames
    with torch.no_grad():
        for module in task.trained().values():
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=stir)
    return task


def vae_task(*overrides: str) -> VAETask:
    task = build_task(tiny("training.task=vae", *overrides), CPU)
    assert isinstance(task, VAETask)
    return task


def text_task(*overrides: str) -> TextTask:
    task = build_task(tiny("training.task=text", *overrides), CPU)
    assert isinstance(task, TextTask)
    return task


def batch_of(task: Task, *positions: int) -> Batch:
    """The clips at these positions, in this order."""
    stream = task.dataset("train")
    samples = [stream[position] for position in positions]
    return Batch(
        video=torch.stack([sample["video"] for sample in samples]),
        captions=[sample["caption"] for sample in samples],
        ids=[sample["id"] for sample in samples],
        indices=[sample["index"] for sample in samples],
        positions=[sample["position"] for sample in samples],
        bad=[],
    )


@torch.no_grad()
def loss(task: Task, batch: Batch, *, training: bool = True) -> float:
    return float(task.losses(batch, training=training)["loss"])


# ---- random draws


def test_every_clip_and_purpose_has_its_own_stream() -> None:
    keys = [
        (seed, position, purpose) for seed in (0, 1) for position in (0, 1, 2**40) for purpose in (NOISE, POSTERIOR)
    ]
    draws = [tuple(torch.randn(4, generator=clip_generator(*key)).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(torch.randn(4, generator=clip_generator(*key)).tolist()) for key in keys]


@pytest.mark.parametrize("make", [unet_task, vae_task])
@pytest.mark.parametrize("training", [True, False])
def test_a_clips_loss_depends_on_seed_and_position_alone(make: Callable[..., Task], training: bool) -> None:
    task = make("training.caption_dropout=0.5")
    positions = (0, 1, 5, 18)
    torch.manual_seed(0)
    together = loss(task, batch_of(task, *positions), training=training)
    torch.manual_seed(1)
    assert loss(task, batch_of(task, *positions), training=training) == together
    alone = [loss(task, batch_of(task, position), training=training) for position in positions]
    assert sum(alone) / 4 == pytest.approx(together, rel=1e-5)
    assert loss(task, batch_of(task, *positions[::-1]), training=training) == pytest.approx(together, rel=1e-5)
    assert len(set(alone)) == 4


def test_another_seed_or_epoch_draws_other_noise() -> None:
    task = unet_task()
    batch = batch_of(task, 3)
    later = replace(batch, positions=[batch.positions[0] + 16])  # the same clip one epoch later
    other = unet_task()
    other.config = replace(other.config, seed=1)
    assert len({loss(task, batch), loss(task, later), loss(other, batch)}) == 3


def test_validation_draws_are_not_those_of_training() -> None:
    task = unet_task("training.caption_dropout=0")
    batch = batch_of(task, 0, 1)
    assert loss(task, batch, training=True) != loss(task, batch, training=False)


# ---- the UNet's task


def test_the_unet_and_a_trainable_text_tower_learn() -> None:
    joint, alone = unet_task(), unet_task("text.text_trainable=false")
    assert set(joint.trained()) == {"unet", "text"}
    assert set(alone.trained()) == {"unet"}
    for task in (joint, alone):
        task.losses(batch_of(task, 0, 1), training=True)["loss"].backward()
        for part, module in task.modules.items():
            learns = part in task.trained()
            assert all(p.requires_grad is learns for p in module.parameters())
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters()) is learns, part


def test_every_parameter_of_the_unet_gets_a_gradient() -> None:
    task = unet_task("model.attention_levels=[true, true]")
    task.losses(batch_of(task, 0, 1), training=True)["loss"].backward()
    idle = [name for name, p in task.parts.unet.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle


def test_caption_dropout_takes_its_share_of_the_captions() -> None:
    captions: list[str] = []
    task = unet_task("training.caption_dropout=0.25")
    encode = task.parts.text_encoder.forward
    task.parts.text_encoder.forward = lambda prompts: (captions.extend(prompts), encode(prompts))[1]  # type: ignore[method-assign]
    batch = batch_of(task, *range(4))
    for first in range(0, 400, 4):
        loss(task, replace(batch, positions=list(range(first, first + 4))))
    assert 60 < captions.count("") < 140  # 100 expected, standard deviation 8.7
    assert set(captions) - {""} == set(batch.captions)
    captions.clear()
    loss(task, batch, training=False)
    assert captions == batch.captions, "validation keeps them all"


@pytest.mark.parametrize(("share", "depends"), [(0, True), (1, False)])
def test_without_captions_the_loss_does_not_depend_on_them(share: int, depends: bool) -> None:
    task = unet_task(f"training.caption_dropout={share}")
    batch = batch_of(task, 0, 1)
    others = replace(batch, captions=["something else", "entirely"])
    assert (loss(task, batch) != loss(task, others)) is depends
    assert loss(task, batch, training=False) != loss(task, others, training=False)


def test_cached_latents_give_the_same_loss() -> None:
    """Up to the half precision that they are kept in; mini-something cuts nothing away."""
    plain, cached = unet_task(), unet_task("data.cache_latents=true")
    assert isinstance(cached.dataset("train"), KeptLatents) and not isinstance(plain.dataset("train"), KeptLatents)
    batch = batch_of(cached, 0, 1, 2)
    assert batch.video.shape == (3, 8, 4, 4, 4)
    assert loss(cached, batch) == pytest.approx(loss(plain, batch_of(plain, 0, 1, 2)), rel=1e-3)
    assert not batch.video.requires_grad


def test_latents_are_drawn_from_the_posterior() -> None:
    task = unet_task()
    batch = batch_of(task, 0)
    with torch.no_grad():
        posterior = task.parts.vae.encode(to_float(batch.video))
        drawn = posterior.sample([clip_generator(0, 0, POSTERIOR)])
        assert torch.equal(task._latents(batch), drawn)
        assert not torch.allclose(drawn, posterior.mode())


def test_the_preview_shows_the_configured_prompts(tmp_path: Path) -> None:
    task = unet_task("training.preview_prompts=[a red ball, a blue cup]")
    batch = next(batches(task.dataset("validation"), batch_size=3))
    task.preview(tmp_path / "one", batch)
    task.preview(tmp_path / "two", batch)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"00.mp4", "01.mp4", "contact_sheet.png", "captions.json"}
    assert read_clip(tmp_path / "one" / "01.mp4", fps=8.0, num_frames=4, start=0.0).shape == (4, 16, 16, 3)
    for name in ("00.mp4", "contact_sheet.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    task.config = replace(task.config, training=replace(task.config.training, preview_prompts=()))
    task.preview(tmp_path / "captions", batch)
    assert len(list((tmp_path / "captions").glob("*.mp4"))) == 3


# ---- the autoencoder's task


def test_the_autoencoder_alone_is_built_and_learns() -> None:
    task = vae_task()
    assert set(task.modules) == set(task.trained()) == {"vae"}
    assert all(p.requires_grad for p in task.vae.parameters())
    unet = unet_task()
    for ours, theirs in zip(task.vae.parameters(), unet.parts.vae.parameters(), strict=True):
        assert torch.equal(ours, theirs), "the same first weights as in a whole model"


def test_the_autoencoders_losses_fit_together() -> None:
    terms = ("kl_weight", "edge_weight", "colour_weight")
    values: dict[str, dict[str, float]] = {}
    for chosen in ("none", *terms):
        task = vae_task(*(f"training.{term}={0.5 if term == chosen else 0}" for term in terms))
        with torch.no_grad():
            losses = task.losses(batch_of(task, 0, 1), training=True)
        values[chosen] = {name: float(value) for name, value in losses.items()}
        assert all(torch.isfinite(value) for value in losses.values())
    bare = values["none"]
    assert bare["loss"] == pytest.approx(bare["reconstruction"])
    assert values["kl_weight"]["loss"] == pytest.approx(bare["loss"] + 0.5 * bare["kl"], rel=1e-5)
    assert values["edge_weight"]["loss"] > bare["loss"] and values["colour_weight"]["loss"] > bare["loss"]
    assert bare["kl"] > 0.0 and bare["latent_std"] > 0.0


def test_the_autoencoders_loss_is_its_formula() -> None:
    task = vae_task("training.edge_weight=0.5", "training.colour_weight=0.25", "training.kl_weight=0")
    batch = batch_of(task, 0, 1)
    video = to_float(batch.video)
    error = 0.1 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    task.vae.decode = lambda z: video + error  # type: ignore[method-assign]
    e = error.double()
    edges = e.diff(dim=3).abs().mean() + e.diff(dim=4).abs().mean()
    colour = (e - e.mean(1, keepdim=True)).square().mean()
    expected = e.abs().mean() + 4.0 * e.square().mean() + 0.25 * colour + 0.5 * edges
    assert loss(task, batch) == pytest.approx(float(expected), rel=1e-5)


def test_the_colour_term_is_blind_to_grey() -> None:
    """An error that is the same in all three channels costs nothing in it."""
    task = vae_task("training.colour_weight=1000")
    batch = batch_of(task, 0)
    task.vae.decode = lambda z: to_float(batch.video) + 0.1  # type: ignore[method-assign]
    grey = loss(task, batch)
    tint = torch.tensor([0.1, -0.1, 0.0]).reshape(1, 3, 1, 1, 1)
    task.vae.decode = lambda z: to_float(batch.video) + tint  # type: ignore[method-assign]
    assert grey < 1.0 < loss(task, batch)


def test_psnr_is_that_of_the_decoded_mode() -> None:
    task = vae_task()
    batch = batch_of(task, 0, 1)
    video = to_float(batch.video)
    with torch.no_grad():
        decoded = task.vae.decode(task.vae.encode(video).mode())
        value = float(task.losses(batch, training=False)["psnr"])
    error = (decoded - video).square().mean() / 4  # on pixels in [0,1]
    assert value == pytest.approx(float(-10 * torch.log10(error)), rel=1e-5)


def test_the_autoencoder_learns() -> None:
    task = vae_task()
    batch = batch_of(task, 0, 1, 2, 3)
    optimizer = torch.optim.Adam(task.vae.parameters(), lr=5e-3)
    first = loss(task, batch)
    for _ in range(20):
        optimizer.zero_grad()
        task.losses(batch, training=True)["loss"].backward()
        optimizer.step()
    assert loss(task, batch) < 0.7 * first


def test_the_autoencoders_preview_shows_clips_beside_reconstructions(tmp_path: Path) -> None:
    task = vae_task()
    batch = next(batches(task.dataset("validation"), batch_size=3))
    task.preview(tmp_path, batch)
    assert len(list(tmp_path.glob("*.mp4"))) == 6
    sheet = cv2.imread(str(tmp_path / "contact_sheet.png"))
    assert sheet is not None and sheet.shape[0] > 6 * 16
    shown = torch.from_numpy(read_clip(tmp_path / "00.mp4", fps=8.0, num_frames=4, start=0.0)).permute(3, 0, 1, 2)
    assert (shown / 127.5 - 1.0 - to_float(batch.video[0])).abs().mean() < 0.1, "the first is the clip itself"


# ---- the text tower's task


def test_the_text_tower_learns_and_the_autoencoder_does_not() -> None:
    task = text_task()
    assert set(task.modules) == {"vae", "text", "contrast"} and set(task.trained()) == {"text", "contrast"}
    task.losses(batch_of(task, 0, 1, 2), training=True)["loss"].backward()
    for part, module in task.modules.items():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters()) is (part != "vae"), part
    assert int(task.text_encoder.seen_tokens.sum()) == 0, "in evaluation mode nothing counts as seen"
    task.text_encoder.train()
    loss(task, batch_of(task, 0))
    assert int(task.text_encoder.seen_tokens.sum()) > 3


def test_the_contrastive_loss_by_hand() -> None:
    """Three clips, two of them of one caption: float64 cross-entropies of both directions."""
    task = text_task()
    batch = replace(batch_of(task, 0, 1, 2), captions=["a red ball", "a blue cup", "a red ball"])
    table = torch.tensor([[2.0, 0.0, 1.0], [0.5, -1.0, 0.0], [1.0, 3.0, 0.0]])
    task.head.forward = lambda latents, pooled: table  # type: ignore[method-assign]
    losses = task.losses(batch, training=False)
    right = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]], dtype=torch.float64)
    both = [-(right * scores.double().log_softmax(dim=1)).sum(1).mean() for scores in (table, table.T)]
    assert float(losses["loss"]) == pytest.approx(float(sum(both) / 2), rel=1e-6)
    assert float(losses["retrieval"]) == pytest.approx(1 / 3), "of the first clip alone the best caption is right"


def test_the_order_of_the_batch_does_not_matter() -> None:
    task = text_task()
    forth, back = loss(task, batch_of(task, 0, 1, 2, 3)), loss(task, batch_of(task, 3, 1, 0, 2))
    assert forth == pytest.approx(back, rel=1e-5)
    assert loss(task, batch_of(task, 0, 1, 2, 3), training=False) != forth, "means, not draws, are validated"


def test_the_towers_learn_which_caption_is_whose() -> None:
    task = text_task()
    batch = replace(
        batch_of(task, 0, 1, 2, 3), captions=[f"from {a} to {b}" for a in ("left", "right") for b in ("right", "left")]
    )
    optimizer = torch.optim.Adam([p for module in task.trained().values() for p in module.parameters()], lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        task.losses(batch, training=True)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        assert float(task.losses(batch, training=False)["retrieval"]) == 1.0


def test_the_text_preview_shows_every_clip_under_the_caption_that_fits(tmp_path: Path) -> None:
    task = text_task("data.cache_latents=true")
    task.preview(tmp_path, next(batches(task.dataset("validation"), batch_size=3)))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"00.mp4", "01.mp4", "02.mp4", "contact_sheet.png", "captions.json"}


# ---- what is refused, or warned of


def test_one_clip_alone_has_nothing_to_be_compared_with() -> None:
    with pytest.raises(UserError, match="set training.batch_size to 2 or more"):
        text_task("training.batch_size=1")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [((), ["vae.vae_weights"]), (("text.text_trainable=false",), ["vae.vae_weights", "text.text_weights"])],
)
def test_random_networks_that_never_learn_are_warned_of(
    capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], named: list[str]
) -> None:
    warn_of_random_parts(tiny(*overrides))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" is null")[0] for line in lines] == [f"warning: {key}" for key in named]
    warn_of_random_parts(tiny("training.task=vae"))
    assert not capsys.readouterr().err, "all that it has is trained"


def test_fp16_needs_a_gpu() -> None:
    for task in ("unet", "vae", "text"):
        with pytest.raises(UserError, match="fp16 needs a CUDA device"):
            build_task(tiny("training.mixed_precision=fp16", f"training.task={task}"), CPU)
