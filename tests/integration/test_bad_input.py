"""Bad input: one clear sentence, exit code 2, no traceback, and nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vdm.components import build_components
from vdm.config import load
from vdm.data.mini_something import write_ssv2
from vdm.pipeline import TextToVideo

Command = Callable[..., Any]
TINY = Path(__file__).parents[1] / "fixtures" / "tiny.yaml"
FACTOR_8 = ("vae.vae_channels=[8, 8, 8, 8]", "sampling.height=24", "sampling.width=24")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model whose VAE is 8 times smaller in space, as the original's is."""
    config = load(TINY, FACTOR_8)
    folder = tmp_path_factory.mktemp("model") / "model"
    TextToVideo(config, build_components(config)).save_pretrained(folder)
    return folder


def written(folder: Path) -> set[Path]:
    """All files but the lock of a run folder."""
    return {path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what bad input may point at."""
    (tmp_path / "file").write_text("a regular file", encoding="utf-8")
    (tmp_path / "blank.txt").write_text(" \n\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "typo.yaml").write_text("training:\n  bach_size: 2\n", encoding="utf-8")
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "1.mp4").write_bytes(b"not a video")
    (tmp_path / "half-written").mkdir()
    (tmp_path / "half-written" / "config.yaml").write_text(TINY.read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


# ---- train.py


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("PLACE/typo.yaml", "training.bach_size.*batch_size"),
        ("TINY training.bach_size=2", "bach_size.*batch_size"),
        ("TINY lerning_rate=2", "lerning_rate.*learning_rate"),
        ("TINY training.batch_size=four", "training.batch_size must be a whole number, got 'four'"),
        ("TINY training.batch_size", "must be written as section.key=value"),
        ("TINY training.batch_size=0", "training.batch_size must be at least 1"),
        ("PLACE/nowhere.yaml", "config .*nowhere.yaml does not exist"),
        ("PLACE/empty", "is a folder"),
        ("PLACE/list.yaml", "must consist of lines"),
        ("", "the following arguments are required: config"),
        ("TINY data.format=ssv2 data.root=PLACE/videos", "has no annotations"),
        ("TINY data.format=ssv2 data.root=PLACE/nowhere", "data folder .* does not exist"),
        ("TINY data.format=ssv2", "set data.root"),
        ("TINY data.format=folder data.root=PLACE/empty", "holds no video"),
        ("TINY data.height=20 vae.vae_channels=[8,8,8,8]", "data.height=20 is not divisible by 8"),
        ("TINY data.width=20 vae.vae_channels=[8,8,8,8]", "data.width=20 is not divisible by 8"),
        ("TINY sampling.height=18", "sampling.height=18 is not divisible by 4"),
        ("TINY data.min_frames=0", "data.min_frames must be at least 1"),
        ("TINY data.max_frames=0", "data.max_frames must be at least 1"),
        ("TINY data.max_frames=9", "data.max_frames=9 is more than model.max_num_frames=8"),
        ("TINY sampling.num_frames=9", "sampling.num_frames=9 is more than model.max_num_frames=8"),
        ("TINY run_dir=PLACE/file/run", "run folder .* cannot be written"),
        ("TINY --resum latest", "unrecognized arguments: --resum"),
        ("TINY --resume", "expected one argument"),
        ("TINY --plan --resume latest", "--plan trains nothing"),
        ("TINY --plan --gpu A1000", "invalid choice: 'A1000'"),
        ("TINY --plan --mfu 0", "--mfu must be above 0 and at most 1"),
        ("TINY --plan --mfu 40", "--mfu must be above 0 and at most 1"),
        ("TINY --gpu A100", "--gpu is for --plan"),
        ("TINY --plan training.bach_size=2", "bach_size.*batch_size"),
        ("TINY --verify_resume --resume latest", "leave --resume out"),
        ("TINY --resume PLACE/empty", "no manifest.json"),
        ("TINY --resume PLACE/half-written", "no manifest.json"),
        ("TINY --resume PLACE/nowhere", "does not exist"),
        ("TINY --resume PLACE/file", "is not a folder"),
        ("TINY --resume MODEL", "may not change: "),
        ("TINY training.init_from=PLACE/empty", "no manifest.json"),
        ("TINY vae.vae_weights=PLACE/empty", "no manifest.json"),
        ("TINY vae.vae_weights=MODEL", "vae.vae_channels is"),
        ("TINY text.text_weights=PLACE/empty", "no manifest.json"),
        ("TINY text.text_weights=PLACE/nowhere", "neither a model folder, nor a file"),
        pytest.param("TINY training.mixed_precision=fp16", "fp16 needs a CUDA device", marks=needs_no_gpu),
    ],
)
def test_train(command: Command, place: Path, model: Path, arguments: str, sentence: str) -> None:
    before = written(place)
    tiny = str(TINY) if "run_dir" in arguments else f"{TINY} run_dir=PLACE/run"
    words = arguments.replace("TINY", tiny).replace("PLACE", str(place)).replace("MODEL", str(model))
    result = command("train.py", *words.split())
    assert_says(result.error, sentence)
    assert written(place) == before


def assert_says(sentence: str, pattern: str) -> None:
    assert re.search(pattern, sentence), sentence


def test_train_refuses_a_data_set_with_too_many_unreadable_clips(command: Command, tmp_path: Path) -> None:
    """They are named and counted; what can be known before the first step is found in the folder's listing."""
    root, run_dir = tmp_path / "clips", tmp_path / "run"
    write_ssv2(root, num_clips=6, size=16, num_frames=4, fps=8.0, seed=0)
    broken = sorted((root / "20bn-something-something-v2").iterdir())[:3]
    for path in broken:
        path.write_bytes(b"not a video")
    data = ("data.format=ssv2", f"data.root={root}", "data.max_bad_share=0.3")
    result = command("train.py", TINY, f"run_dir={run_dir}", *data)
    assert_says(result.error, r"[23] of 5 clips \(\d+ %\) cannot be read .*data.max_bad_share=0.3")
    for line in result.err.splitlines():
        if line.startswith("warning: clip "):
            assert any(path.name in line for path in broken)
    assert not list(run_dir.glob("checkpoint-*")) and not (run_dir / "final").exists()

    for path in broken:
        path.unlink()
    result = command("train.py", TINY, f"run_dir={tmp_path / 'other'}", *data)
    assert_says(result.error, r"[23] of 5 clips \(\d+ %\) cannot be read .*no file")
    assert not written(tmp_path / "other")


def test_the_number_of_processes_must_be_the_one_that_is_said(command: Command, tmp_path: Path) -> None:
    result = command("train.py", TINY, f"run_dir={tmp_path / 'run'}", "training.num_gpus=2")
    assert_says(result.error, "training.num_gpus is 2, but processes are 1: .*nproc_per_node=2")
    assert not written(tmp_path / "run")


# ---- sample.py


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", ""], "list of prompts is empty"),
        (["--prompt", "a ball", "--prompt", "  "], "holds an empty one"),
        (["--prompt_file", "PLACE/blank.txt"], "holds no prompt"),
        (["--prompt_file", "PLACE/nowhere.txt"], "cannot be read"),
        (["--prompt_file", "PLACE/empty"], "cannot be read"),
        (["--prompt_file", "PLACE/latin.txt"], "cannot be read"),
        (["--prompt_file", "PLACE/file", "--prompt", "a ball"], "not both"),
        (["--checkpoint", "PLACE/empty"], "no manifest.json"),
        (["--checkpoint", "PLACE/half-written"], "no manifest.json"),
        (["--checkpoint", "PLACE/nowhere"], "does not exist"),
        (["--height", "20"], "height=20 is not divisible by 8"),
        (["--width", "12"], "width=12 is not divisible by 8"),
        (["--height", "0"], "height is 0; it must be 1 or more"),
        (["--height", "-8"], "height is -8; it must be 1 or more"),
        (["--num_frames", "0"], "num_frames is 0"),
        (["--num_frames", "9"], "num_frames=9 is more than this model's model.max_num_frames=8"),
        (["--num_frames", "many"], "invalid int value: 'many'"),
        (["--steps", "0"], "num_inference_steps is 0"),
        (["--steps", "1001"], "1001"),
        (["--eta", "1.5"], "eta is 1.5"),
        (["--guidance_scale", "nan"], "guidance_scale is nan"),
        (["--fps", "0"], "--fps must be above 0"),
        (["--fps", "nan"], "--fps must be above 0"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--seed", str(2**70)], "--seed"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--num_videos_per_prompt", "0"], "--num_videos_per_prompt must be at least 1"),
        (["--sampler", "euler"], "invalid choice: 'euler'"),
        (["--sampler", "dpmpp", "--eta", "0.5"], "eta is not for the sampler dpmpp"),
        (["--lora_path", "PLACE/empty"], "holds 0 .safetensors files"),
        (["--lora-scale", "0.5"], "--lora_scale is that of --lora_path"),
        (["--strength", "0.5"], "--strength is that of --init_video"),
        (["--init_video", "PLACE/nowhere.mp4"], "nowhere.mp4 cannot be read: no such file"),
        (["--init_video", "PLACE/file"], "file cannot be read"),
        (["--lora_path", "PLACE/file"], "cannot be read as a weight file"),
        (["--lora-path", "PLACE/nowhere", "--lora-scale", "0.5"], "LoRA .*nowhere does not exist"),
        (["--dtype", "fp64"], "invalid choice: 'fp64'"),
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        pytest.param(["--device", "cuda"], "--device cuda cannot be used here", marks=needs_no_gpu),
        (["--output_dir", "PLACE/file/out"], "output folder .* cannot be written"),
        (["--output_dir", "PLACE/file"], "output folder .* cannot be written"),
        (["--promt", "a ball"], "unrecognized arguments: --promt"),
        (["a ball"], "'a ball' is no setting of sampling; write what is one as sampling.key=value"),
        (["sampling.vae_tile=2"], "vae_tile is 2; it must be 8 latents or more, or null"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_sample(command: Command, place: Path, model: Path, arguments: list[str], sentence: str) -> None:
    before = written(place)
    words = [word.replace("PLACE", str(place)) for word in arguments]
    result = command("sample.py", "--checkpoint", model, "--output_dir", place / "out", *words)
    assert_says(result.error, sentence)
    assert written(place) == before


@pytest.mark.parametrize("change", ["cut short", "damaged", "missing", "newer"])
def test_sample_refuses_a_checkpoint_that_is_not_what_its_manifest_says(
    command: Command, model: Path, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    file = folder / "unet.safetensors"
    content = file.read_bytes()
    if change == "cut short":
        file.write_bytes(content[:-1])
    elif change == "damaged":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif change == "missing":
        file.unlink()
    else:
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 99'))
    result = command("sample.py", "--checkpoint", folder, "--output_dir", tmp_path / "out")
    assert_says(result.error, {"newer": "update vdm"}.get(change, "unet.safetensors"))
    assert not written(tmp_path / "out")


# ---- vdm


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "arguments are required: command"),
        ("bogus", "invalid choice: 'bogus'"),
        ("evaluate", "vdm evaluate needs --generated DIR"),
        ("evaluate --generated PLACE/videos", "vdm evaluate needs --reference DIR"),
        ("evaluate --generated PLACE/nowhere --reference b", "nowhere has no samples.jsonl"),
        ("evaluate --generated a --reference b --metrics fid", "no metric 'fid'; did you mean"),
        ("evaluate --generated a --reference b --selftest", "are three things; ask for one"),
        ("evaluate --compare PLACE/empty PLACE/videos", "empty holds no metrics.json"),
        ("evaluate --compare PLACE/empty", "two different folders or more"),
        ("convert PLACE/nowhere b --to diffusers", "checkpoint .*nowhere does not exist"),
        ("report PLACE/nowhere", "nowhere is not of a run, for it is not a folder"),
        ("report PLACE/empty", "empty is not of a run, for it holds no log.jsonl; name the folder"),
        ("report PLACE/file", "file is not of a run"),
        ("report", "arguments are required: RUN"),
        ("data", "vdm data needs a command"),
        ("data check PLACE/empty", "holds no video"),
        ("data check PLACE/nowhere", "does not exist"),
        ("data view PLACE/nowhere --output x.html", "does not exist"),
        ("data cache x.yaml", "config x.yaml does not exist"),
        ("data bogus", "vdm data needs a command: synth, check, view or cache"),
        ("data synth PLACE/new", "arguments are required: --num_clips"),
        ("data synth PLACE/new --num_clips 1", "at least 2"),
        ("data synth PLACE/new --num_clips 4 --size 0", "at least 1 frame, 16 pixels a side"),
        ("data synth PLACE/new --num_clips 4 --num_frames 0", "at least 1 frame"),
        ("data synth PLACE/new --num_clips 4 --fps 0", "a positive frame rate"),
        ("data synth PLACE/new --num_clips 4 --fps inf", "a positive frame rate"),
        ("data synth PLACE/new --num_clips 4 --seed -1", "seed is -1: it must be 0 or more"),
        ("data synth PLACE/videos --num_clips 4", "already holds files"),
        ("data synth PLACE/file/new --num_clips 4", "cannot write to"),
        ("data synth PLACE/new --num_clips 4 --sise 3", "unrecognized arguments: --sise"),
    ],
)
def test_vdm(command: Command, place: Path, arguments: str, sentence: str) -> None:
    before = written(place)
    result = command("vdm", *arguments.replace("PLACE", str(place)).split())
    assert_says(result.error, sentence)
    assert written(place) == before and not (place / "new").exists()


# ---- as the shell sees it


def test_the_exit_code_of_the_processes(shell: Command, tmp_path: Path) -> None:
    for arguments, sentence in (
        (("train.py", TINY, f"run_dir={tmp_path}/run", "training.bach_size=2"), "did you mean|batch_size"),
        (("sample.py", "--sampler", "euler"), "invalid choice: 'euler'"),
        (("-m", "vdm", "evaluate"), "vdm evaluate needs --generated DIR"),
    ):
        result = shell(*arguments)
        assert_says(result.error, sentence)
        assert (result.code, result.out, result.err) == (2, "", f"error: {result.error}\n")
    assert not list(tmp_path.iterdir())
