"""Commands as functions: how flags are spelled, what help says, and which exit code follows from what."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from vdm import cli, generate
from vdm.cli import Parser, main, run, sample_command, train_command, vdm_command
from vdm.errors import UserError
from vdm.generate import PROMPTS, Request
from vdm.training import loop

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "fixtures" / "tiny.yaml"

SAMPLE_FLAGS = {
    "checkpoint": "DIR", "prompt": "TEXT", "prompt_file": "FILE", "negative_prompt": "TEXT", "steps": "N", "eta": "F",
    "sampler": "{ddim,ddpm,dpmpp}", "guidance_scale": "F", "num_frames": "N", "height": "N", "width": "N", "fps": "N",
    "seed": "N", "num_videos_per_prompt": "N", "batch_size": "N", "lora_path": "DIR", "lora_scale": "F",
    "init_video": "FILE", "strength": "F",
    "output_dir": "DIR", "device": "D", "dtype": "{fp32,fp16,bf16}",
}  # fmt: skip


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What `sample.py` asks to be made."""
    seen: list[Request] = []

    def record(request: Request) -> list[Path]:
        seen.append(request)
        return [request.output_dir / "00000-clip.mp4"]

    monkeypatch.setattr(generate, "generate", record)
    return seen


# ---- sample.py


def test_nothing_given_is_the_shipped_model_and_the_built_in_prompts(requests: list[Request]) -> None:
    sample_command(["--steps", "50"])
    assert requests == [Request(prompts=PROMPTS, steps=50)]
    assert requests[0].output_dir == Path("results/samples")
    assert len(PROMPTS) >= 2


@pytest.mark.parametrize("dash", ["_", "-"])
def test_every_flag_takes_underscore_and_hyphen(requests: list[Request], tmp_path: Path, dash: str) -> None:
    wanted: dict[str, Any] = {
        "checkpoint": tmp_path, "negative_prompt": "dark", "steps": 3, "sampler": "ddpm", "eta": 0.5, "width": 24,
        "guidance_scale": 2.5, "num_frames": 4, "height": 16, "fps": 12.5, "seed": 9, "num_videos_per_prompt": 2,
        "batch_size": 3, "output_dir": tmp_path / "out", "device": "cpu", "dtype": "bf16",
    }  # fmt: skip
    words = [word for name, value in wanted.items() for word in (f"--{name.replace('_', dash)}", str(value))]
    sample_command(["--prompt", "one", "--prompt", "two", *words])
    assert requests == [Request(prompts=("one", "two"), **wanted)]
    sample_command(["--init-image", "a.png"])
    made = requests.pop()
    assert (made.init_video, made.strength) == (Path("a.png"), Request(PROMPTS).strength)
    sample_command(["sampling.vae_tile=32", "--steps", "2", "sampling.guidance_at_once=false"])
    assert requests[1].overrides == ("sampling.vae_tile=32", "sampling.guidance_at_once=false")


@pytest.mark.parametrize("spelling", ["--steps", "--num_inference_steps", "--num-inference-steps"])
def test_the_number_of_steps_has_an_alias(requests: list[Request], spelling: str) -> None:
    sample_command([spelling, "7"])
    sample_command([f"{spelling}=7"])
    assert [request.steps for request in requests] == [7, 7]


@pytest.mark.parametrize("dash", ["_", "-"])
def test_prompts_may_come_from_a_file(requests: list[Request], tmp_path: Path, dash: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n", encoding="utf-8")
    sample_command([f"--prompt{dash}file", str(file)])
    assert requests[0].prompts == ("one", "two")


def test_a_flag_is_never_guessed_from_its_beginning(requests: list[Request]) -> None:
    with pytest.raises(UserError, match="unrecognized arguments: --out; see sample.py --help"):
        sample_command(["--out", "x"])
    assert not requests


# ---- train.py


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, str | None]]:
    """What `train.py` asks to be trained."""
    seen: list[tuple[Any, str | None]] = []
    monkeypatch.setattr(loop, "train", lambda config, *, resume=None: seen.append((config, resume)))
    return seen


@pytest.mark.parametrize(
    ("arguments", "resume"),
    [
        ([TINY, "seed=3", "batch_size=1"], None),
        ([TINY, "seed=3", "batch_size=1", "--resume", "latest"], "latest"),
        ([TINY, "--resume", "some/checkpoint-5", "seed=3", "batch_size=1"], "some/checkpoint-5"),
        (["--resume=latest", TINY, "seed=3", "training.batch_size=1"], "latest"),
        ([TINY, "seed=3", "--resume", "latest", "batch_size=1"], "latest"),
    ],
)
def test_overrides_and_flags_may_be_mixed(
    runs: list[tuple[Any, str | None]], arguments: list[object], resume: str | None
) -> None:
    train_command([str(word) for word in arguments])
    ((config, given),) = runs
    assert (config.name, config.seed, config.training.batch_size, given) == ("tiny", 3, 1, resume)


# ---- help


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            train_command,
            (
                "config",
                "section.key=value",
                "--resume",
                "latest|PATH",
                "--plan",
                "--gpu",
                "--mfu",
                "--json",
                "--verify_resume",
            ),
        ),
        (sample_command, [f"--{name} {value}" for name, value in SAMPLE_FLAGS.items()]),
        (sample_command, ("--num_inference_steps", "--num-inference-steps", "--output-dir", "results/samples")),
        (vdm_command, ("data", "evaluate", "convert", "report", "--help of its own")),
    ],
)
def test_help_is_complete(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[[Sequence[str]], None],
    words: Sequence[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as leaving:
        command(["--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    for word in words:
        assert word in shown
    assert "-h, --help" in shown


def test_help_of_data_names_all_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    vdm_command(["data", "--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("synth", "check", "view", "cache"))


@pytest.mark.parametrize("words", [["data", "synth", "--help"], ["data", "synth", "out", "-h"]])
def test_help_of_synth(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        vdm_command(words)
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    for name in ("num_clips", "size", "num_frames", "fps", "seed"):
        assert f"--{name}" in shown
    for default in ("default 64", "default 16", "default 8", "default 0"):
        assert default in shown


def test_help_and_refusals_do_not_wait_for_torch() -> None:
    """Importing torch takes seconds."""
    code = (
        "import sys\n"
        "from vdm.cli import main, run, sample_command, train_command\n"
        "sys.argv = ['sample.py', '--sampler', 'euler']; assert run(sample_command) == 2\n"
        "sys.argv = ['train.py', 'x.yaml', '--plan', '--mfu', '2']; assert run(train_command) == 2\n"
        "sys.argv = ['vdm', 'evaluate']; assert main() == 2\n"
        "sys.argv = ['sample.py', '--help']\n"
        "try:\n    run(sample_command)\nexcept SystemExit as leaving:\n    assert leaving.code in (None, 0)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 3


# ---- exit codes


def test_the_exit_code_says_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: Sequence[str]) -> None:
        raise UserError("the cup is empty; fill it")

    def interrupt(_: Sequence[str]) -> None:
        raise KeyboardInterrupt

    def fail(_: Sequence[str]) -> None:
        raise ValueError("a bug")

    assert run(lambda arguments: None) == 0
    assert run(refuse) == 2
    assert capsys.readouterr().err == "error: the cup is empty; fill it\n"
    assert run(interrupt) == 1
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ValueError, match="a bug"):  # a bug keeps its traceback; the interpreter then exits with 1
        run(fail)


def test_commands_get_the_arguments_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["vdm", "data", "x"])
    assert run(lambda arguments: seen.append(list(arguments))) == 0
    assert seen == [["data", "x"]]
    monkeypatch.setattr(cli, "vdm_command", lambda arguments: seen.append(list(arguments)))
    assert main() == 0
    assert len(seen) == 2


def test_a_parser_raises_instead_of_leaving() -> None:
    parser = Parser(prog="it", description="")
    parser.flag("--some_name", "--other_name", type=int)
    for spelling in ("--some_name", "--some-name", "--other_name", "--other-name"):
        assert vars(parser.parse_args([spelling, "3"])) == {"some_name": 3}
    with pytest.raises(UserError, match="invalid int value: 'x'; see it --help"):
        parser.parse_args(["--some-name", "x"])


def test_python_m_vdm_is_the_console_command() -> None:
    done = subprocess.run([sys.executable, "-m", "vdm", "bogus"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
