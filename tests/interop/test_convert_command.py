"""`vdm convert` as a command, and what others make of its folders; bad input is one sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CONFIG

from vdm.config import load, to_yaml
from vdm.errors import UserError
from vdm.interop import open_model
from vdm.pipeline import TextToVideo
from vdm.weights import write_safetensors

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("unet", "vae", "text")
Command = Callable[..., Any]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("PLACE/nowhere PLACE/t --to vdm", "checkpoint .*nowhere does not exist"),
        ("PLACE/file.txt PLACE/t --to vdm", "is not a folder"),
        ("PLACE/empty PLACE/t --to vdm", "has no manifest.json"),
        ("PLACE/sdxl PLACE/t --to vdm", "holds a StableDiffusionXLPipeline, which is another model"),
        ("PLACE/animatediff PLACE/t --to vdm", "holds a AnimateDiffPipeline, which is another model"),
        ("PLACE/cut PLACE/t --to vdm", "model_index.json is not valid JSON"),
        ("PLACE/other PLACE/t --to vdm", "describes some-detector, not the original's text-to-video model"),
        ("PLACE/unet-alone PLACE/t --to vdm", "has no model_index.json: a diffusers folder is not complete without it"),
        ("PLACE/lora.safetensors PLACE/t --to vdm", "is no Stable Diffusion 2 in one file"),
        ("MODEL PLACE/t --to keras", "argument --to: invalid choice: 'keras'"),
        ("MODEL PLACE/t", "the following arguments are required: --to"),
        ("MODEL PLACE/empty/t --to vdm --variant fp16", "is no diffusers folder"),
        ("MODEL PLACE/file.txt/t --to vdm", "cannot be written"),
        ("MODEL PLACE/file.txt/t --to diffusers", "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(
    command: Command, model: Path, tmp_path: Path, arguments: str, sentence: str
) -> None:
    place = tmp_path
    (place / "file.txt").write_text("a file")
    write_safetensors(place / "lora.safetensors", {"a.lora_A.weight": torch.ones(1, 1)})
    for name in ("empty", "sdxl", "animatediff", "cut", "other", "unet-alone/unet"):
        (place / name).mkdir(parents=True)
    (place / "sdxl" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    (place / "animatediff" / "model_index.json").write_text('{"_class_name": "AnimateDiffPipeline"}')
    (place / "cut" / "model_index.json").write_text('{"_class_name": "TextToV')
    (place / "other" / "configuration.json").write_text('{"model": {"type": "some-detector"}}')
    words = arguments.replace("PLACE", str(place)).replace("MODEL", str(model)).split()
    before = {path for path in place.rglob("*")}
    error = command("vdm", "convert", *words).error
    assert re.search(sentence, error), error
    assert {path for path in place.rglob("*")} == before


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("unet/config.json", {"act_fn": "gelu"}, "unet/config.json: act_fn is 'gelu', and this model"),
        ("unet/config.json", {"block_out_channels": [16, 24, 48]}, "are no multiples of the first"),
        ("unet/config.json", {"_class_name": "UNetMotionModel"}, "_class_name is 'UNetMotionModel'"),
        ("unet/config.json", {"block_out_channels": "wide"}, "unet/config.json makes no sense"),
        ("unet/config.json", {"cross_attention_dim": 24}, "model.context_dim=24 must equal text.text_width=16"),
        ("unet/config.json", {"layers_per_block": 2}, r"has no down_blocks.0.resnets.1.norm1.weight"),
        ("unet/config.json", {"block_out_channels": [16, 32, 64]}, r"conv1.weight is \(48, 32, 3, 3\), where"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor is 0.1"),
        ("vae/config.json", {"use_quant_conv": False}, "use_quant_conv is False"),
        ("text_encoder/config.json", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("text_encoder/config.json", {"vocab_size": 1000}, "vocab_size is 1000"),
        ("text_encoder/config.json", {"intermediate_size": 32}, "intermediate_size is 32"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ("tokenizer/vocab.json", {"cat</w>": 3}, "does not hold CLIP's vocabulary"),
        ("model_index.json", {"_class_name": None}, "holds a None"),
        ("unet/config.json", {"block_out_channels": [0, 0]}, "unet/config.json makes no sense"),
        ("unet/config.json", {"layers_per_block": 1.5}, "model.num_res_blocks must be a whole number, got '1.5'"),
        ("vae/config.json", {"layers_per_block": True}, "vae.layers_per_block must be a whole number, got 'true'"),
        ("text_encoder/config.json", {"num_hidden_layers": 1.5}, "text.text_layers must be a whole number"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "scheduler_config.json makes no sense"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "config.json: prediction_type eps"),
    ],
)  # fmt: skip
def test_folders_of_another_model_are_named(
    command: Command, exported: dict[str, Path], file: str, changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    edit(folder / file, **changes)
    error = command("vdm", "convert", folder, tmp_path / "t", "--to", "vdm").error
    assert re.search(sentence, error), error
    assert not (tmp_path / "t").exists()
    with pytest.raises(UserError, match=sentence):
        TextToVideo.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["unet/config.json", "scheduler/scheduler_config.json", "vae/diffusion_pytorch_model.safetensors"]
)
def test_a_file_that_is_gone_is_named(command: Command, exported: dict[str, Path], name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    (folder / name).unlink()
    error = command("vdm", "convert", folder, tmp_path / "t", "--to", "vdm").error
    assert Path(name).name.split(".")[0] in error, error


def test_the_command_converts(shell: Command, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "d"
    done = shell("-m", "vdm", "convert", model, target, "--to", "diffusers", "--dtype", "fp16")
    assert done.code == 0 and "unet: " in done.out and "wrote " in done.out, done
    made = shell(
        "sample.py", "--checkpoint", target, "--steps", "2", "--prompt", "ball", "--output_dir", tmp_path / "o"
    )
    assert made.code == 0 and len(list((tmp_path / "o").glob("*.mp4"))) == 1, made


@pytest.mark.slow
def test_training_starts_from_any_layout(shell: Command, exported: dict[str, Path], tmp_path: Path) -> None:
    """vae.vae_weights, text.text_weights and training.init_from take the folders as they are."""
    folder = exported["diffusers"]
    (tmp_path / "c.yaml").write_text(to_yaml(replace(CONFIG, data=load(ROOT / "tests/fixtures/tiny.yaml").data)))
    done = shell(
        "train.py", tmp_path / "c.yaml", f"run_dir={tmp_path / 'run'}", "data.width=24", "training.max_train_steps=1",
        "training.batch_size=1", "training.learning_rate=1e-9", f"training.init_from={folder}",
        f"vae.vae_weights={folder}", f"text.text_weights={folder}",
    )  # fmt: skip
    assert done.code == 0, done
    theirs = open_model(folder)
    trained = open_model(tmp_path / "run" / "final")
    for part in PARTS:
        want, have = theirs.open(part).weights, trained.open(part).weights
        for name in want:
            if name != "seen_tokens":
                torch.testing.assert_close(have[name], want[name], atol=1e-6, rtol=0)
