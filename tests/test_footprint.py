"""The memory of a run that is only imagined, against what the CPU's allocator gives out when it really runs."""

from __future__ import annotations

import gc
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from vdm import flops
from vdm.config import Config, load
from vdm.footprint import footprint
from vdm.memory import OTHER, imagined
from vdm.training.kinds import build_task
from vdm.training.trainer import Trainer

TINY = Path(__file__).parent / "fixtures" / "tiny.yaml"
# An image model of one level: imagined in two seconds.
LEAST = (
    "model.model_type=spatial",
    "model.channel_mult=[1]",
    "model.attention_levels=[true]",
    "text.text_trainable=false",
    "batch_size=4",
)
ONE_LEVEL = (
    "model.channel_mult=[1]",
    "model.attention_levels=[true]",
    "text.text_trainable=false",
    "data.max_frames=8",
)
LARGER = (
    "data.min_frames=8",
    "data.max_frames=8",
    "model.unet_dim=64",
    "data.height=64",
    "data.width=64",
    "batch_size=4",
)


def config_of(*overrides: str) -> Config:
    return load(TINY, overrides)


def allocated(config: Config, run_dir: Path) -> dict[str, int]:
    """Peaks of the allocator, in bytes, while the real trainer takes its second step, validates and previews."""
    run_dir.mkdir(exist_ok=True)
    gc.collect()  # or what an earlier run left behind is freed in this one's account
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = Trainer(config, build_task(config, torch.device("cpu")), run_dir)
        for module in trainer.trained.values():
            module.train()
        with closing(trainer.train_batches()) as stream:
            micro_steps = config.training.gradient_accumulation_steps
            trainer.train_step([next(stream) for _ in range(micro_steps)])
            micro_batches = [next(stream) for _ in range(micro_steps)]
            with record_function("training step"):
                trainer.train_step(micro_batches)
            del micro_batches
        with trainer.ema.applied():
            with record_function("validation"):
                trainer.validate()
            with record_function("preview"):
                trainer.preview(run_dir / "preview")
    return {phase: _peak(profiler, phase) for phase in ("training step", "validation", "preview")}


def _peak(profiler: profile, phase: str) -> int:
    events = profiler.profiler.kineto_results.events()
    (whole,) = (event for event in events if event.name() == phase)
    start, end = whole.start_ns(), whole.start_ns() + whole.duration_ns()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now, most = 0, 0
    for moment, change in changes:
        now += change
        most = max(most, now) if start <= moment <= end else most
    return most


def assert_right(config: Config, run_dir: Path) -> None:
    imagined_peaks, real = footprint(config, cuda=False).peaks, allocated(config, run_dir)
    for phase, peak in real.items():
        assert imagined_peaks[phase] == pytest.approx(peak, rel=0.02), phase


def test_the_least_run_holds_what_was_imagined(tmp_path: Path) -> None:
    assert_right(config_of(*LEAST, "data.min_frames=8", "data.max_frames=8"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("gradient_checkpointing=block", "mixed_precision=bf16", "text.text_trainable=false"),
        ("batch_size=2", "gradient_accumulation_steps=2", "optimizer=muon", "data.cache_latents=true"),
        ("training.task=vae", "vae.vae_channels=[16,32,32]"),
    ],
    ids=",".join,
)
def test_a_run_holds_what_was_imagined(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert_right(config_of(*LARGER, *overrides), tmp_path)


# ---- what has a closed form


def test_what_stays_is_counted_to_the_byte() -> None:
    """Four float32 numbers a weight that learns: itself, two moments, its average; and all others once."""
    config = config_of(*LEAST, "data.min_frames=8", "data.max_frames=8")  # as above: it is imagined once
    made = build_task(config, torch.device("cpu"))
    trained = {part: sum(p.numel() for p in module.parameters()) for part, module in made.trained().items()}
    measured = footprint(config, cuda=False)
    assert measured.trained == trained
    held = measured.phases["save"]
    assert held["averaged weights"] == 4 * sum(trained.values())
    steps = 4 * len([p for module in made.trained().values() for p in module.parameters()])  # AdamW counts for each
    assert held["optimizer"] == 8 * sum(trained.values()) + steps
    for part, module in made.modules.items():
        tensors = (*module.parameters(), *module.buffers())
        assert held[f"weights of {part}"] == sum(t.numel() * t.element_size() for t in tensors)
    assert held.get(OTHER, 0) < 100_000, "the noise schedule"


@pytest.mark.slow
def test_operations_are_three_forward_passes_and_one_more_where_they_are_repeated() -> None:
    config = config_of(*ONE_LEVEL)
    forward = 2 * flops.unet_forward(config, num_frames=8)
    frozen = 2 * (flops.vae_encode(config, num_frames=8) + flops.text_forward(config))
    plain = footprint(config).step_flops
    assert plain == pytest.approx(3 * forward + frozen, rel=0.03)
    again = footprint(config_of(*ONE_LEVEL, "gradient_checkpointing=block")).step_flops
    assert 0.7 * forward < again - plain < forward, "all but the ends"


def test_a_gpu_keeps_no_matrix_of_attention_and_norms_in_float32() -> None:
    with imagined(cuda=True) as ledger:
        q = torch.empty(1, 2, 512, 16, requires_grad=True)
        before = sum(ledger.held.values())
        kept = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert sum(ledger.held.values()) - before < 2 * kept.nbytes, "far below 2 x 512 x 512 numbers"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.nn.functional.layer_norm(torch.empty(4, 8, dtype=torch.bfloat16), (8,)).dtype == torch.float32
    assert torch.nn.functional.layer_norm(torch.ones(4, 8), (8,)).shape == (4, 8), "and all is as it was"


@pytest.mark.slow
def test_a_graph_is_planned_without_a_gpu_as_what_it_replays() -> None:
    plain = (*LEAST, "model.temporal_dropout=0")
    assert footprint(config_of(*plain, "training.cuda_graph=true")).phases == footprint(config_of(*plain)).phases


def test_offloaded_averages_are_not_on_the_gpu() -> None:
    held = footprint(config_of(*LEAST, "training.ema_offload=true")).phases["training step"]
    assert "averaged weights" not in held and held["optimizer"]


@pytest.mark.slow
def test_a_cache_spares_the_autoencoder_and_the_text_tower() -> None:
    config = config_of(*LEAST, "data.cache_dir=nowhere")
    assert {kind for kind in footprint(config).phases["training step"] if "weights" in kind} == {
        "weights of unet",
        "averaged weights",
    }
    assert footprint(config).step_flops == pytest.approx(12 * flops.unet_forward(config, num_frames=4), rel=0.03)


# ---- the ledger


def test_a_ledger_follows_every_storage() -> None:
    with imagined(cuda=False) as ledger:
        a = torch.empty(1000)
        b = a.view(10, 100)
        assert ledger.held == {OTHER: 4000}, "a view is no memory of its own"
        ledger.mark("mine", [b])
        c = b + 1
        ledger.watch()
        del c
        assert ledger.held["mine"] == 4000 and ledger.held[OTHER] == 0
        assert ledger.peak == {"mine": 4000, OTHER: 4000}
        del a
        assert ledger.held["mine"] == 4000, "the view keeps it"
        del b
        assert sum(ledger.held.values()) == 0
        x = torch.empty(8, 16)
        assert (x @ x.T).shape == (8, 8) and ledger.flops == 2 * 8 * 8 * 16
        assert float(x.sum()) == 0.75 and bool(torch.isfinite(x).all()) and int(torch.empty(1, dtype=torch.long)) == 1
