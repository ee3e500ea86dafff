"""Every line of benchmarks/parity.py is within its bound; more shapes than the table has room for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import parity

pytestmark = pytest.mark.parity
ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(1, 1, 8, 8), (3, 5, 7, 10), (1, 24, 6, 4), (2, 3, 9, 5), (5, 2, 4, 12), (1, 16, 5, 5), (3, 7, 3, 14)]


@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_unet_and_its_gradients(seed: int) -> None:
    output, gradients = parity.unet_errors(parity.SMALL, SHAPES[seed], seed=seed)
    assert output < 1e-5 and gradients < parity.GRADIENTS


@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_unet_and_its_gradients_but_for_rounding(seed: int) -> None:
    output, gradients = parity.unet_errors(parity.SMALL, SHAPES[seed], seed=seed, dtype=torch.float64)
    assert output < 1e-9 and gradients < 1e-9


def test_a_mid_size_unet() -> None:
    output, gradients = parity.unet_errors(parity.MID, (3, 5, 7, 10), seed=1)
    assert output < 1e-5 and gradients < parity.GRADIENTS


@pytest.mark.parametrize("seed", range(3))
def test_autoencoder(seed: int) -> None:
    assert max(parity.vae_errors(parity.SMALL_VAE, seed=seed)) < 1e-5


def test_stable_diffusions_autoencoder() -> None:
    assert max(parity.vae_errors(parity.VAEConfig())) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_text_tower(seed: int) -> None:
    assert parity.text_error(parity.SMALL_TEXT, seed=seed) < 1e-5


@pytest.mark.parametrize("setting", list(parity.settings()), ids=lambda s: f"{s[0]}-{s[1]}-{s[3]}")
def test_samplers(setting: tuple[str, int, parity.DiffusionConfig, float]) -> None:
    sampler, steps, config, eta = setting
    assert parity.sampler_error(config, steps, sampler=sampler, eta=eta) < 1e-6


def test_a_pipeline_that_diffusers_saved_makes_the_same_frames_here(tmp_path: Path) -> None:
    assert parity.opened_here(tmp_path) < 1e-3


@pytest.mark.parametrize("steps", [3, 7, 30])
def test_also_where_the_steps_do_not_divide_a_thousand(steps: int, tmp_path: Path) -> None:
    theirs = parity.their_pipeline(tmp_path, parity.END_TO_END)
    ours = parity.TextToVideo.from_pretrained(tmp_path / "saved")
    assert parity.frame_error(ours, theirs, num_steps=steps) < 1e-4


def test_random_steps_draw_the_same_noise(tmp_path: Path) -> None:
    """From one generator, frame by frame, after the noise that sampling starts from."""
    theirs = parity.their_pipeline(tmp_path, parity.END_TO_END)
    ours = parity.TextToVideo.from_pretrained(tmp_path / "saved")
    options = {
        "num_inference_steps": 5,
        "num_frames": 4,
        "height": 24,
        "width": 32,
        "output_type": "latent",
        "eta": 0.7,
    }
    have, want = (
        pipe("a ball", generator=torch.Generator().manual_seed(2), **options).frames for pipe in (ours, theirs)
    )
    assert parity.relative(have, want) < 1e-5


def test_an_export_runs_without_being_told_a_size(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    parity.convert(ROOT / "vdm" / "assets" / "demo", tmp_path / "demo", to="diffusers", say=lambda line: None)
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "demo")
    assert theirs("a red ball", num_inference_steps=1, num_frames=2).frames.shape == (1, 2, 64, 64, 3)


def test_the_demo_model_makes_the_same_frames_there(tmp_path: Path) -> None:
    assert parity.opened_there(tmp_path) < 1e-3


@pytest.mark.parametrize("generators", ["one", "one each"])
def test_noise_from_generators_is_the_same(generators: str, tmp_path: Path) -> None:
    theirs = parity.their_pipeline(tmp_path, parity.END_TO_END)
    ours = parity.TextToVideo.from_pretrained(tmp_path / "saved")

    def draws() -> object:
        made = [torch.Generator().manual_seed(i) for i in (4, 5)]
        return made if generators == "one each" else made[0]

    options = {"num_inference_steps": 3, "num_frames": 4, "height": 24, "width": 32, "output_type": "latent"}
    have, want = (pipe(list(parity.PROMPTS), generator=draws(), **options).frames for pipe in (ours, theirs))
    assert parity.relative(have, want) < 1e-5


def test_a_difference_would_be_seen() -> None:
    """The comparison itself: one weight of ours is off, and the error says so."""
    real = parity.take

    def off(module: torch.nn.Module, *args: object, **kwargs: object) -> None:
        real(module, *args, **kwargs)  # type: ignore[arg-type]
        with torch.no_grad():
            next(p for name, p in module.named_parameters() if "temporal" in name).mul_(1.2)

    parity.take = off
    try:
        output, gradients = parity.unet_errors(parity.SMALL, (1, 3, 6, 6))
    finally:
        parity.take = real
    assert output > 1e-4 and gradients > 1e-4


@pytest.mark.slow
def test_the_full_size_model() -> None:
    assert parity.full_size_error() < 1e-4


@pytest.mark.slow
def test_the_command_writes_the_table(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/parity.py", "--json", str(tmp_path / "t.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "t.json").read_text())
    assert len(record["rows"]) == 14 and all(row["error"] <= row["bound"] for row in record["rows"])
    assert "commit" in record and record["diffusers"] and record["versions"]
