"""benchmarks/demo.py scores clips against their prompts and not others', and the command works."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import demo, demo_table
from vdm.cli import run
from vdm.components import build_components
from vdm.config import load
from vdm.data.mini_something import Rendered
from vdm.data.settings import DataConfig
from vdm.errors import UserError
from vdm.metrics.action_scores import read_prompt
from vdm.metrics.actions import judge
from vdm.pipeline import TextToVideo
from vdm.vocabulary import ACTIONS

ROOT = Path(__file__).resolve().parents[2]
SEED, CLIPS = 3, 2  # a seed of its own: the rules were made on others


@pytest.fixture(scope="module")
def clips() -> list[Rendered]:
    """The same number of each action, 64x64."""
    data = DataConfig(height=64, width=64)
    streams = [demo.rendered(7, actions=[action.name], seed=SEED, data=data) for action in ACTIONS]
    return [clip for stream in streams for clip in itertools.islice(stream, CLIPS)]


def test_scores_and_chance(clips: list[Rendered]) -> None:
    verdicts, texts = [judge(clip.frames) for clip in clips], [clip.label for clip in clips]
    scores = demo.summarise(verdicts, texts)
    for name in demo.SCORES:
        assert scores[name]["value"] >= 0.95 and 0.0 < scores[name]["chance"] < 0.3, name
        assert scores[name]["ci95"][0] < scores[name]["value"] <= scores[name]["ci95"][1]
    assert set(scores["actions"]) == {action.name for action in ACTIONS}
    others = demo.summarise(verdicts, texts[CLIPS:] + texts[:CLIPS])  # each under the caption of the next action
    assert others["action"]["value"] <= 0.05 and others["action"]["chance"] == scores["action"]["chance"]
    assert others["actions"]["push_right_to_left"]["right"] == 0
    assert others["confusion"]["push_right_to_left"] == {"push_left_to_right": CLIPS}


def test_prompts_are_captions_of_mini_something() -> None:
    texts = demo.draw_prompts(3, seed=1)
    assert texts == demo.draw_prompts(3, seed=1) != demo.draw_prompts(3, seed=2)
    prompts = [read_prompt(text) for text in texts]
    assert [p.action for p in prompts] == [action.name for action in ACTIONS] * 3
    for text, prompt in zip(texts, prompts, strict=True):
        assert "[" not in text and ("white cloth" in text) == (prompt.action == "cover")
        assert len(set(prompt.colours)) == (2 if prompt.action in ("move_closer", "move_apart") else 1)


def test_real_clips_after_an_autoencoder_that_loses_nothing_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "reconstructed", lambda frames, vae: frames // 2 * 2)
    data = DataConfig(height=64, width=64, max_frames=8, min_frames=8, fps=4.0)
    plain = demo.judge_real(1, seed=0, data=data)
    lost = (again := demo.judge_real(1, seed=0, data=data, vae=torch.nn.Identity())).pop("lost")  # type: ignore[arg-type]
    assert again["action"] == plain["action"]
    assert 50 < lost["psnr"] < 52, "half of the values are off by one"
    assert lost["warping_error_after"] == pytest.approx(lost["warping_error"], rel=0.05)
    with pytest.raises(UserError, match="give one of --real, --reconstructed and --gauge"):
        demo.demo_command(["--real", "--reconstructed"])


def test_prompts_in_other_words_ask_for_the_same_things() -> None:
    plain, other = demo.draw_prompts(6, seed=6), demo.draw_prompts(6, seed=6, other_words=True)
    assert [read_prompt(text) for text in plain] == [read_prompt(text) for text in other]
    assert not any(text.lower() == words for text, words in zip(plain, other, strict=True))


def test_the_table_has_a_row_for_every_setting(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"sampler": "dpmpp", "steps": 2, "guidance_scale": scale, "other_words": scale == 2.0} for scale in (None, 2.0)
    ]
    monkeypatch.setattr(demo_table, "settings", lambda: iter(rows))
    file = tmp_path / "table.json"
    demo_table.command(["--checkpoint", str(checkpoint), "--clips_per_action", "1", "--json", str(file)])
    record = json.loads(file.read_text())
    assert [row["guidance_scale"] for row in record["rows"]] == [
        load(checkpoint / "config.yaml").sampling.guidance_scale,
        2,
    ]
    assert list(demo_table.table(record["rows"]))[2:] == capsys.readouterr().out.splitlines()
    with pytest.raises(UserError, match="--clips_per_action must be at least 1"):
        demo_table.command(["--clips_per_action", "0"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that makes clips of 4 frames of 16x16 pixels."""
    model = ["model.in_channels=4", "model.unet_dim=8", "model.channel_mult=[1]", "model.attention_levels=[true]"]
    model += [
        "model.num_res_blocks=1",
        "model.attention_heads=1",
        "model.attention_head_dim=8",
        "model.temporal_layers=1",
    ]
    model += ["model.norm_num_groups=4", "model.context_dim=8", "vae.vae_channels=[4,4]", "vae.vae_norm_num_groups=4"]
    model += ["vae.layers_per_block=1", "text.text_width=8", "text.text_heads=1", "text.text_layers=2"]
    sizes = ["data.height=16", "data.width=16", "sampling.height=16", "sampling.width=16", "data.max_frames=4"]
    config = load(
        ROOT / "configs" / "smoke.yaml",
        [*model, *sizes, "data.min_frames=4", "vae.vae_weights=null", "vae.latent_channels=4"],
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with torch.no_grad():
        TextToVideo(config, build_components(config)).save_pretrained(folder)
    return folder


def test_a_checkpoint_is_judged(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "numbers.json"
    common = ["--checkpoint", str(checkpoint), "--device", "cpu", "--json", str(file)]
    demo.demo_command([*common, "--clips-per-action", "1", "--steps", "1", "sampling.sampler=ddpm"])
    record = json.loads(file.read_text())
    assert record["scores"]["direction"]["clips"] == 11 and record["scores"]["action"]["clips"] == 16
    assert len(record["manifest_sha256"]) == 64 and set(record["environment"]) >= {
        "device",
        "versions",
        "commit",
        "command",
    }
    assert "direction" in capsys.readouterr().out
    assert record["settings"]["overrides"] == ["sampling.sampler=ddpm"]
    distance = record["scores"]["fvd_toy"]
    assert distance["clips"] == 16 and 0 < distance["floor"] < distance["value"], "it was never trained"


def test_the_gauge_is_zero_for_a_model_that_ignores_text(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gauge.json"
    demo.demo_command(["--checkpoint", str(checkpoint), "--gauge", "16", "--device", "cpu", "--json", str(file)])
    rows = json.loads(file.read_text())["gauge"]
    assert [(row["captions"], row["t"]) for row in rows] == [
        (c, t) for c in ("lateral", "other") for t in demo.GAUGED_AT
    ]
    assert all(np.isfinite(list(row.values())[1:]).all() for row in rows) and "gap" in capsys.readouterr().out

    pipe = TextToVideo.from_pretrained(checkpoint)
    for parameter in pipe.text_encoder.parameters():
        torch.nn.init.zeros_(parameter)
    assert all(row["gap"] == 0 for row in demo.gauge(pipe, 16))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--real", "--gauge"],
        ["--clips_per_action", "0"],
        ["--gauge", "3"],
        ["--seed", "-1"],
        ["--checkpoint", "nowhere"],
        ["training.batch_size=3"],
        ["sampling.pag_scale=-1"],
        ["sampling.num_inference_steps=3"],
        ["--real", "sampling.eta=1"],
    ],
)
def test_bad_input_is_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError):
        demo.demo_command(arguments)


def test_bad_input_exits_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--bogus"])
    assert run(demo.demo_command) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_it_runs_from_a_plain_checkout(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "demo.py"), "--real", "--clips_per_action", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "direction" in done.stdout
