"""When a run ends, and that the learning rate has come down by then."""

from __future__ import annotations

import csv
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from vdm.checkpoint import list_checkpoints, read_manifest
from vdm.config import Config, load
from vdm.training.limits import Clock, Limits
from vdm.training.loop import train
from vdm.training.optim import learning_rate
from vdm.training.settings import TrainingConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
PEAK, END, WARM, STEPS, SHARE = 2e-4, 1e-5, 10, 100, 0.2
SCHEDULES = ("cosine", "linear", "constant", "wsd")


def recipe(scheduler: Any, **others: Any) -> TrainingConfig:
    defaults = {"warmup_steps": WARM, "max_train_steps": STEPS, "min_learning_rate": END, "decay_share": SHARE}
    return TrainingConfig(learning_rate=PEAK, lr_scheduler=scheduler, **{**defaults, **others})


# ---- the curve


def torchs(scheduler: str) -> list[float]:
    """The same curve by torch's own schedulers, one after another."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=PEAK)
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / WARM, total_iters=WARM - 1)
    still = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    length = round(SHARE * (STEPS - WARM)) if scheduler == "wsd" else STEPS - WARM
    decay = lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=END / PEAK, total_iters=length)
    phases: dict[str, list[lr_scheduler.LRScheduler]] = {
        "cosine": [rise, lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARM, eta_min=END)],
        "linear": [rise, decay],
        "constant": [rise, still],
        "wsd": [rise, still, decay],
    }
    whole = lr_scheduler.SequentialLR(
        optimizer, phases[scheduler], [WARM, STEPS - length][: len(phases[scheduler]) - 1]
    )
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps of the scheduler without those of the optimizer
        for _ in range(STEPS):
            rates.append(optimizer.param_groups[0]["lr"])
            whole.step()
    return rates


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_the_curve_is_that_of_torchs_schedulers(scheduler: str) -> None:
    ours = [learning_rate(step, recipe(scheduler)) for step in range(STEPS)]
    assert ours == pytest.approx(torchs(scheduler), rel=1e-9)


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_the_curve_is_the_plotted_reference(scheduler: str) -> None:
    """`learning_rates.csv` was written by numpy, corner by corner; see `plot`."""
    with (FIXTURES / "learning_rates.csv").open(encoding="utf-8") as file:
        reference = [float(row[scheduler]) for row in csv.DictReader(file)]
    assert len(reference) == STEPS
    assert [learning_rate(step, recipe(scheduler)) for step in range(STEPS)] == pytest.approx(reference, rel=1e-6)


def plot() -> str:
    """The reference as text; `python tests/training/test_limits.py` prints it."""
    steps = np.arange(STEPS)
    rise = np.interp(steps, [-1, WARM - 1], [0.0, 1.0])
    fall = {
        "cosine": END / PEAK
        + (1 - END / PEAK) * np.cos(np.clip((steps - WARM) / (STEPS - WARM), 0, 1) * np.pi / 2) ** 2,
        "linear": np.interp(steps, [WARM, STEPS], [1.0, END / PEAK]),
        "constant": np.ones(STEPS),
        "wsd": np.interp(steps, [STEPS - SHARE * (STEPS - WARM), STEPS], [1.0, END / PEAK]),
    }
    columns = [PEAK * np.where(steps < WARM, rise, fall[name]) for name in SCHEDULES]
    rows = [f"{step}," + ",".join(f"{column[step]:.8g}" for column in columns) for step in steps]
    return "\n".join([",".join(("step", *SCHEDULES)), *rows, ""])


@given(
    st.sampled_from(SCHEDULES),
    st.integers(0, 30),
    st.integers(1, 60),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
)
def test_the_rate_rises_then_falls_to_its_end(scheduler: str, warm: int, steps: int, end: float, share: float) -> None:
    config = recipe(
        scheduler, warmup_steps=warm, max_train_steps=steps, min_learning_rate=end * PEAK, decay_share=share
    )
    rates = [learning_rate(step, config) for step in range(warm + steps + 5)]
    rising, falling = rates[:warm], rates[warm:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert max(rates) <= PEAK * (1 + 1e-9) and min(falling) >= end * PEAK * (1 - 1e-9)
    if steps > warm and scheduler in ("cosine", "linear"):
        assert rates[steps] == pytest.approx(end * PEAK, abs=1e-12)


def test_wsd_with_no_decay_is_constant_and_with_all_of_it_linear() -> None:
    for share, other in ((0.0, "constant"), (1.0, "linear")):
        ours, theirs = recipe("wsd", decay_share=share), recipe(other)
        assert [learning_rate(s, ours) for s in range(STEPS)] == [learning_rate(s, theirs) for s in range(STEPS)]


# ---- how long


def test_how_many_steps_a_run_will_have() -> None:
    assert Limits(100).expected(7, seconds=3.0) == 100
    assert Limits(100, 60.0).expected(0, seconds=0.0) == 100, "nothing is known yet"
    assert Limits(100, 60.0).expected(5, seconds=6.0) == 50
    assert Limits(40, 60.0).expected(5, seconds=6.0) == 40
    assert Limits(100, 60.0).expected(31, seconds=61.0) == 31


# ---- limits


def limits(*, num_clips: int = 100, clips_per_step: int = 8, **settings: Any) -> Limits:
    return Limits.of(TrainingConfig(**settings), num_clips=num_clips, clips_per_step=clips_per_step)


def test_the_first_limit_ends_the_run() -> None:
    assert limits(max_train_steps=7) == Limits(7)
    assert limits(max_train_epochs=2) == Limits(25)
    assert limits(max_train_epochs=0.1) == Limits(2), "the step that reads the last clip"
    assert limits(max_train_epochs=0.1, num_clips=30, clips_per_step=3) == Limits(1), "0.1 x 30 / 3 is 1"
    assert limits(max_train_epochs=1e-9) == Limits(1)
    assert limits(max_train_epochs=2, max_train_steps=7) == Limits(7)
    timed = limits(max_train_hours=0.5, max_train_steps=7)
    assert timed == Limits(7, 1800.0)
    assert timed.reached(7, seconds=0.0) and timed.reached(0, seconds=1800.0) and not timed.reached(6, seconds=1799.0)


@given(
    st.integers(0, 10),
    st.integers(1, 60),
    st.floats(0.5, 30.0),
    st.lists(st.floats(0.0, 3.0), min_size=30, max_size=50),
)
def test_progress_never_goes_back_and_starts_and_ends_with_the_run(
    warm: int, steps: int, most: float, pace: list[float]
) -> None:
    """Steps take any time: fast, slow, fast again."""
    both, by_steps = Limits(steps, most), Limits(steps)
    seconds, last = 0.0, 0.0
    for step, duration in enumerate(pace):
        done = both.done(step, warmup=warm, seconds=seconds)
        assert last - 1e-12 <= done <= 1.0 and done >= by_steps.done(step, warmup=warm) - 1e-12
        assert step > warm or done == 0.0
        if step > warm and seconds >= most:
            assert done == pytest.approx(1.0)
        last, seconds = done, seconds + duration


def test_a_run_that_time_ends_decays_like_one_of_as_many_steps() -> None:
    """At an even pace the time says what the steps would have said."""
    for scheduler in SCHEDULES:
        by_time, by_steps = recipe(scheduler, max_train_steps=10**6), recipe(scheduler)
        timed = Limits(10**6, 2.0 * STEPS)  # two seconds a step
        for step in range(STEPS):
            done = timed.done(step, warmup=WARM, seconds=2.0 * step)
            assert learning_rate(step, by_time, done=done) == pytest.approx(learning_rate(step, by_steps), rel=1e-3)


def test_the_clock_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("vdm.training.limits.time.monotonic", lambda: now[0])
    clock = Clock()
    clock.before = 50.0
    assert clock.seconds() == 50.0, "it does not run before training does"
    clock.start()
    now[0] += 7.0
    assert clock.seconds() == 57.0


# ---- whole runs


def tiny(run_dir: Path, *overrides: str) -> Config:
    return load(FIXTURES / "tiny.yaml", [f"run_dir={run_dir}", "training.validation_steps=0", *overrides])


def logged(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_epochs_end_a_run_as_so_many_steps_would(tmp_path: Path) -> None:
    """16 clips, two a step: half an epoch is four steps."""
    train(tiny(tmp_path / "epochs", "training.max_train_epochs=0.5"))
    train(tiny(tmp_path / "steps", "training.max_train_steps=4"))
    ours, theirs = logged(tmp_path / "epochs"), logged(tmp_path / "steps")
    assert [(r["step"], r["loss"], r["lr"]) for r in ours] == [(r["step"], r["loss"], r["lr"]) for r in theirs]
    assert (tmp_path / "epochs" / "final").is_dir() and len(ours) == 4
    assert read_manifest(tmp_path / "epochs" / "final").info["step"] == 4


@pytest.mark.slow
def test_hours_end_a_run_over_all_its_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock takes a second, and a step looks a few times."""
    now = [0.0]

    def look() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr("vdm.training.limits.time.monotonic", look)
    overrides = ("training.max_train_hours=0.01", "lr_scheduler=linear", "max_train_steps=1000")  # 36 seconds
    left = train(tiny(tmp_path, *overrides, "training.stop_after_steps=3"))
    spent = read_manifest(left).info["seconds"]
    assert left.name == "checkpoint-3" and 3 <= spent < 36
    done = train(tiny(tmp_path, *overrides), resume="latest")
    assert done.name == "final"
    last = list_checkpoints(tmp_path)[-1]
    assert last.name == f"checkpoint-{read_manifest(done).info['step']}", "the last step is saved as of any run"
    assert read_manifest(last).info["seconds"] >= 36
    rates = [record["lr"] for record in logged(tmp_path)]
    assert 4 < len(rates) < 18, "what was spent before the restart counts"
    falling = rates[2:]
    assert all(b < a for a, b in zip(falling, falling[1:], strict=False)) and rates[-1] < 0.2 * 5e-3
    again = train(tiny(tmp_path, *overrides), resume="latest")
    assert read_manifest(again).info["step"] == len(rates), "a run whose time is up is over"
    assert math.isfinite(rates[-1])


if __name__ == "__main__":
    print(plot(), end="")
