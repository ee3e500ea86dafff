"""Is it learning? Every number against a formula, a hand-made network, or a network that cannot know."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vdm.config import Config, load
from vdm.data.loader import batches
from vdm.diffusion import DiffusionConfig, NoiseSchedule
from vdm.models import UNet3D, UNetConfig, VAEConfig, VideoVAE
from vdm.training.diagnostics import (
    NUM_BINS,
    Tally,
    alarms,
    by_timestep,
    gradient_norms,
    held_out_times,
    in_other_order,
    judge,
    losses_of,
    means_by_timestep,
    other_captions,
    other_order,
    summary,
)
from vdm.training.draws import FRAME_ORDER, HELD_OUT, NOISE, clip_generator
from vdm.training.groups import group_of, is_temporal
from vdm.training.kinds import build_task
from vdm.training.task import UNetTask
from vdm.training.trainer import Trainer

TINY = Path(__file__).parents[1] / "fixtures" / "tiny.yaml"
STEPS = 100
SCHEDULE = NoiseSchedule(DiffusionConfig(num_train_timesteps=STEPS, prediction_type="x0"))
CLIPS = torch.randn(3, 2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.zeros(3, 1, 1)


def tiny(*overrides: str) -> Config:
    return load(TINY, ["training.diagnostics=true", *overrides])


def trainer_of(run_dir: Path, *overrides: str) -> Trainer:
    """A trainer whose networks are stirred, for layers that start at zero would hide frames and text."""
    config = tiny(f"run_dir={run_dir}", *overrides)
    trainer = Trainer(config, build_task(config, torch.device("cpu")), run_dir)
    stir = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=stir)
    return trainer


@pytest.fixture(scope="module")
def stirred(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A trainer that tests leave as it is."""
    return trainer_of(tmp_path_factory.mktemp("stirred"))


# ---- by time step


def test_every_loss_counts_in_the_quarter_of_its_time_step() -> None:
    times = [0, 24, 25, 74, 75, 99, 99]
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    table = {name: float(value) for name, value in by_timestep(losses, times, num_steps=STEPS).items()}
    assert [table[f"sum_t{b}"] for b in range(4)] == [3.0, 4.0, 8.0, 112.0]
    assert [table[f"count_t{b}"] for b in range(4)] == [2.0, 1.0, 1.0, 3.0]


def test_losses_are_added_up_in_full_precision_within_autocast() -> None:
    losses = torch.tensor([1.0 + 1e-4, 1.0 - 1e-4, 70000.0])
    with torch.autocast("cpu", torch.bfloat16):
        table = by_timestep(losses, [0, 1, 30], num_steps=STEPS)
    assert table["sum_t0"] == losses[:2].sum() and table["sum_t1"] == 70000.0


@settings(max_examples=25)
@given(st.lists(st.lists(st.tuples(st.integers(0, STEPS - 1), st.floats(0, 10)), min_size=1, max_size=5), min_size=1))
def test_means_over_steps_and_micro_steps_are_those_of_all_clips(steps: list[list[tuple[int, float]]]) -> None:
    """Every step is cut into two micro-steps, whose numbers are averaged as the trainer does."""
    averaged = []
    for clips in steps:
        halves = [half for half in (clips[::2], clips[1::2]) if half]
        tables = [by_timestep(torch.tensor([x for _, x in h]), [t for t, _ in h], num_steps=STEPS) for h in halves]
        averaged.append({name: sum(float(table[name]) for table in tables) / len(tables) for name in tables[0]})
    # Steps with another number of micro-steps weigh otherwise; here all clips of a step share one weight.
    weights = [1 / len([half for half in (clips[::2], clips[1::2]) if half]) for clips in steps]
    means = means_by_timestep(averaged)
    for b in range(NUM_BINS):
        pairs = [(w, x) for w, clips in zip(weights, steps, strict=True) for t, x in clips if t * 4 // STEPS == b]
        if not pairs:
            assert f"loss_t{b}" not in means
        else:
            expected = sum(w * x for w, x in pairs) / sum(w for w, _ in pairs)
            assert means[f"loss_t{b}"] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_step_that_is_not_finite_does_not_count() -> None:
    steps = [{"sum_t0": 2.0, "count_t0": 2.0}, {"sum_t0": math.nan, "count_t0": 1.0}, {"loss": 1.0}]
    assert means_by_timestep(steps) == {"loss_t0": 1.0}


@given(st.integers(0, 10**9), st.sampled_from([2, 4, 10, 100, 1000]))
def test_a_held_out_clip_has_a_time_step_in_every_quarter(position: int, num_steps: int) -> None:
    times = held_out_times(position, num_steps=num_steps)
    assert len(times) == NUM_BINS and times == sorted(times)
    assert all(num_steps * b // NUM_BINS <= t < math.ceil(num_steps * (b + 1) / NUM_BINS) for b, t in enumerate(times))


def test_the_time_steps_of_many_clips_are_spread_evenly() -> None:
    for count in (16, 64):
        times = sorted(t for p in range(count) for t in held_out_times(p, num_steps=1000))
        ideal = [(i + 0.5) * 1000 / len(times) for i in range(len(times))]
        assert max(abs(t - want) for t, want in zip(times, ideal, strict=True)) < 2.5 * 1000 / len(times)


# ---- what is taken away


@given(st.integers(1, 9), st.integers(0, 10**6))
def test_another_order_is_another_and_no_reverse(num_frames: int, seed: int) -> None:
    order = other_order(num_frames, torch.Generator().manual_seed(seed))
    forth = list(range(num_frames))
    assert sorted(order.tolist()) == forth
    assert (order.tolist() != forth) is (num_frames > 1)
    assert num_frames < 3 or order.tolist() != forth[::-1]


def test_the_network_sees_the_frames_shuffled_and_its_answers_are_put_back() -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        seen.append(x)
        return 2.0 * x

    orders = torch.tensor([[1, 2, 0, 4, 3], [0, 1, 2, 4, 3], [4, 3, 2, 0, 1]])
    answer = in_other_order(network, orders)(CLIPS, torch.zeros(3), CONTEXT)
    assert torch.equal(answer, 2.0 * CLIPS)
    assert torch.equal(seen[0][2, :, 0], CLIPS[2, :, 4]) and torch.equal(seen[0][0, :, 3], CLIPS[0, :, 4])


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12))
def test_other_captions_are_those_of_others(captions: list[str]) -> None:
    others = other_captions(captions)
    assert Counter(others) == Counter(captions), "each as often as it is right"
    same = sum(other == right for other, right in zip(others, captions, strict=True))
    most = max(Counter(captions).values())
    assert same == 0 if 2 * most <= len(captions) else same == 2 * most - len(captions)


def by_hand(network: nn.Module | object, *, shuffle: bool = False) -> Tensor:
    """Mean squared errors of x0, float64 (B,), from the definition: clip by clip, quarter by quarter."""
    rows = []
    for position, clip in enumerate(CLIPS.double()):
        draw = clip_generator(HELD_OUT, position, NOISE)
        noise = torch.randn(NUM_BINS, *clip.shape, generator=draw).double()
        order = other_order(clip.shape[1], clip_generator(HELD_OUT, position, FRAME_ORDER))
        errors = []
        for eps, t in zip(noise, held_out_times(position, num_steps=STEPS), strict=True):
            x_t = SCHEDULE.signal.double()[t] * clip + SCHEDULE.noise.double()[t] * eps
            target = clip[:, order] if shuffle else clip
            answer = network((x_t[:, order] if shuffle else x_t)[None], None, None)[0]  # type: ignore[operator]
            errors.append((answer - target).square().mean())
        rows.append(torch.stack(errors).mean())
    return torch.stack(rows)


def judged(network: object, **more: object) -> dict[str, Tensor]:
    return judge(network, CLIPS, positions=[0, 1, 2], schedule=SCHEDULE, context=CONTEXT, **more)  # type: ignore[arg-type]


def test_loss_and_temporal_gain_of_a_network_that_uses_its_neighbours() -> None:
    """The frame before it, for each frame: of a clip in another order that is another frame."""

    def network(x: Tensor, t: object, context: object) -> Tensor:
        return x.roll(1, dims=2) if x.ndim == 5 else x.roll(1, dims=1)

    values = judged(network, other_context=CONTEXT, differs=[True] * 3)
    torch.testing.assert_close(values["loss"].double(), by_hand(network), rtol=1e-5, atol=1e-6)
    gain = by_hand(network, shuffle=True) - by_hand(network)
    torch.testing.assert_close(values["temporal_gain"].double(), gain, rtol=1e-4, atol=1e-5)
    assert gain.abs().min() > 1e-3
    quarters = torch.stack([values[f"loss_t{b}"] for b in range(NUM_BINS)])
    torch.testing.assert_close(quarters.mean(0), values["loss"])


def test_a_network_without_time_or_text_gains_nothing_to_the_bit() -> None:
    values = judged(lambda x, t, context: x.tanh(), other_context=CONTEXT + 1, differs=[True, False, True])
    assert values["temporal_gain"].tolist() == [0.0] * 3
    assert values["caption_gain"].tolist() == [0.0] * 2, "a clip without another caption does not count"


def test_the_caption_gain_of_a_network_that_says_what_it_reads() -> None:
    """It answers the number in the context everywhere: the error is that of a constant."""
    values = judged(
        lambda x, t, context: context[:, :, 0, None, None, None].expand_as(x) * 1.0,
        other_context=CONTEXT + 2.0,
        differs=[True, True, False],
    )
    x0 = CLIPS.double().flatten(1)
    expected = (x0 - 2.0).square().mean(1) - x0.square().mean(1)
    torch.testing.assert_close(values["caption_gain"].double(), expected[:2], rtol=1e-5, atol=1e-6)
    assert values["temporal_gain"].tolist() == [0.0] * 3


def test_one_frame_has_no_order_and_without_others_there_are_no_gains() -> None:
    one = judge(
        lambda x, t, context: x, CLIPS[:, :, :1], positions=[0, 1, 2], schedule=SCHEDULE, context=CONTEXT,
        other_context=CONTEXT, differs=[True] * 3,
    )  # fmt: skip
    assert "temporal_gain" not in one and "caption_gain" in one
    assert set(judged(lambda x, t, context: x)) == {"loss", *(f"loss_t{b}" for b in range(NUM_BINS))}


# ---- in a run


def test_a_spatial_unet_gains_nothing_from_order_and_one_with_time_does(stirred: Trainer, tmp_path: Path) -> None:
    spatial = trainer_of(tmp_path, "model.model_type=spatial")
    values = {"modelscope": stirred.validate(), "spatial": spatial.validate()}
    assert abs(values["spatial"]["temporal_gain"]) < 1e-7 < abs(values["modelscope"]["temporal_gain"])
    assert all(abs(value["caption_gain"]) > 1e-7 for value in values.values())
    assert abs(values["spatial"]["temporal_gain_error"]) < 1e-7 < values["modelscope"]["temporal_gain_error"]


def test_a_text_tower_that_says_nothing_has_no_caption_gain(stirred: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = stirred.task.modules["text"].forward
    monkeypatch.setattr(stirred.task.modules["text"], "forward", lambda texts: torch.zeros_like(encode(texts)))
    assert stirred.validate()["caption_gain"] == 0.0


def test_held_out_clips_are_judged_alike_for_every_seed_and_batch_size(stirred: Trainer, tmp_path: Path) -> None:
    """The same clips and weights, for mini-something's depend on the seed."""
    (batch,) = stirred.held_out_batches(3)
    other = trainer_of(tmp_path, "seed=7", "training.batch_size=1")
    for part, module in other.task.modules.items():
        module.load_state_dict(stirred.task.modules[part].state_dict())
    ours, theirs = (one.task.judge(batch, others=stirred._other_captions) for one in (stirred, other))
    assert ours.keys() == theirs.keys() >= {"loss", "temporal_gain", "caption_gain"}
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_whole_validation_is_the_mean_over_clips_with_its_error(stirred: Trainer) -> None:
    clips = list(batches(stirred.held_out, batch_size=1))
    with torch.no_grad():
        each = [stirred.task.judge(batch, others=stirred._other_captions) for batch in clips]
    values = stirred.validate()
    gains = torch.cat([clip["temporal_gain"] for clip in each]).double()
    assert values["val_loss"] == pytest.approx(sum(float(clip["loss"]) for clip in each) / 3, rel=1e-5)
    assert values["temporal_gain"] == pytest.approx(float(gains.mean()), abs=1e-6)
    assert values["temporal_gain_error"] == pytest.approx(float(gains.std()) / math.sqrt(3), rel=1e-2, abs=1e-7)
    assert {f"val_loss_t{b}" for b in range(NUM_BINS)} <= values.keys()


def test_diagnostics_can_be_switched_off_change_no_loss_and_cost_two_validations(tmp_path: Path) -> None:
    calls, values = {}, {}
    for switch in (True, False):
        trainer = trainer_of(tmp_path, f"training.diagnostics={str(switch).lower()}")
        seen: list[int] = []
        trainer.task.modules["unet"].register_forward_hook(lambda *_, seen=seen: seen.append(1))
        values[switch] = trainer.validate()
        calls[switch] = len(seen)
    assert calls == {True: 3 * NUM_BINS * 2, False: NUM_BINS * 2}, "three clips in batches of two"
    gains = {f"{of}_gain{more}" for of in ("temporal", "caption") for more in ("", "_error")}
    assert values[True].keys() - values[False].keys() == gains
    assert all(values[True][name] == value for name, value in values[False].items())


def test_how_much_clips_move_is_told_with_every_preview(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    task = trainer.task
    assert isinstance(task, UNetTask)
    batch = next(trainer.held_out_batches(3))
    brighter = torch.linspace(-1, 1, 4)[None, None, :, None, None]
    scales = iter([0.5])  # the preview is decoded first, then what the data's clips become
    task.parts.vae.decode = lambda z, **_: next(scales, 1.0) * brighter.expand(len(z), 3, 4, 16, 16)  # type: ignore[method-assign]
    values = task.preview(tmp_path / "preview", batch)
    assert values == pytest.approx({"preview_motion": 1 / 6, "data_motion": 1 / 3, "motion_ratio": 0.5})


# ---- what is said of it


def test_a_tally_has_means_and_standard_errors() -> None:
    tally = Tally()
    tally.add({"loss": torch.tensor([1.0, 2.0]), "temporal_gain": torch.tensor([1.0, 2.0]), "a_gain": torch.empty(0)})
    tally.add({"loss": torch.tensor([6.0]), "temporal_gain": torch.tensor([6.0])})
    error = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2 / 3)
    numbers = tally.numbers()
    assert numbers == pytest.approx({"val_loss": 3.0, "temporal_gain": 3.0, "temporal_gain_error": error})
    assert summary(numbers) == "val_loss 3.0000, temporal_gain 3.0000 +- 1.5275"
    assert losses_of({**numbers, "val_loss_t1": 1.0, "val_psnr": 2.0}) == {"val_loss": 3.0, "val_psnr": 2.0}


GOOD = {"temporal_gain": 0.1, "temporal_gain_error": 0.01, "caption_gain": 0.1, "caption_gain_error": 0.01}


@pytest.mark.parametrize(
    ("change", "overrides", "step", "named"),
    [
        ({}, (), 5000, []),
        ({"temporal_gain": 0.02}, (), 5000, ["temporal_gain 0.020000 \\+- 0.010000"]),
        ({"temporal_gain": -0.3}, (), 5000, ["temporal_gain -0.3"]),
        ({"temporal_gain": 0.0210}, (), 5000, []),
        ({"temporal_gain": 0.0}, (), 999, []),
        ({"temporal_gain": 0.0}, ("training.max_train_steps=300",), 199, []),
        ({"temporal_gain": 0.0}, ("training.max_train_steps=300",), 200, ["temporal_gain 0.0"]),
        ({"temporal_gain": 0.0}, ("model.model_type=spatial",), 5000, []),
        ({"caption_gain": 0.0, "temporal_gain": 0.0}, (), 5000, ["temporal_gain 0.0", "caption_gain 0.0"]),
        ({"caption_gain": 0.0}, ("training.caption_dropout=1",), 5000, []),
        ({"motion_ratio": 0.1}, (), 5000, ["previews move 0.10 times"]),
    ],
)
def test_alarms(change: dict[str, float], overrides: tuple[str, ...], step: int, named: list[str]) -> None:
    config = tiny("training.max_train_steps=10000", *overrides)
    found = alarms(GOOD | change, step=step, num_steps=config.training.max_train_steps, config=config)
    assert len(found) == len(named)
    for sentence, name in zip(found, named, strict=True):
        assert sentence.startswith("alarm: ") and re.search(name, sentence)


# ---- groups of parameters


def test_temporal_parameters_are_those_that_an_image_model_lacks() -> None:
    with torch.device("meta"):
        video, image = UNet3D(UNetConfig()), UNet3D(UNetConfig(model_type="spatial"))
        vae = VideoVAE(VAEConfig(temporal_decoder=True))
        plain = VideoVAE(VAEConfig(temporal_decoder=False))
    for whole, part in ((video, image), (vae, plain)):
        names = {name for name, _ in whole.named_parameters()}
        temporal = {name for name in names if is_temporal(name)}
        assert names - temporal == {name for name, _ in part.named_parameters()}
        assert temporal
    assert [group_of(part, "decoder.time.0.x") for part in ("unet", "vae", "text")] == ["temporal", "temporal", "text"]


def test_gradient_norms_by_group_make_up_the_whole(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.task.losses(next(trainer.train_batches()), training=True)["loss"].backward()
    norms = gradient_norms(trainer.trained)
    assert norms.keys() == {"grad_norm_spatial", "grad_norm_temporal", "grad_norm_text"}
    total = torch.nn.utils.clip_grad_norm_(trainer.parameters, 1e9)
    assert math.sqrt(sum(norm**2 for norm in norms.values())) == pytest.approx(float(total), rel=1e-5)
    unet = trainer.trained["unet"].named_parameters()
    squares = [float(p.grad.double().square().sum()) for name, p in unet if is_temporal(name) and p.grad is not None]
    assert norms["grad_norm_temporal"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


def test_they_are_taken_before_clipping_and_at_logged_steps(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "training.max_grad_norm=1e-3", "training.log_steps=3", "training.max_train_steps=5")
    stream = trainer.train_batches()
    steps = [trainer.train_step([next(stream)]) for _ in range(5)]
    assert ["grad_norm_spatial" in step for step in steps] == [True, False, True, False, True]
    parts = [value for name, value in steps[0].items() if name.startswith("grad_norm_")]
    assert math.sqrt(sum(norm**2 for norm in parts)) == pytest.approx(steps[0]["grad_norm"], rel=1e-4)
