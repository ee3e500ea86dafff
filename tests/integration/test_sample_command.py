"""`sample.py` on a run that `train.py` has just finished: playable files, their records, the same clips every time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from vdm.generate import PROMPTS as PROMPTS_BUILT_IN

Command = Callable[..., Any]
PROMPTS = ("Pushing a red ball from left to right", "Holding a blue cup")
KEYS = {
    "file", "prompt", "negative_prompt", "seed", "steps", "sampler", "eta", "guidance_scale", "num_frames", "height",
    "width", "fps", "checkpoint",
}  # fmt: skip


def frames(path: Path) -> np.ndarray:
    """(T,H,W,3) uint8, decoded here and not by the code under test."""
    with av.open(str(path)) as mp4:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in mp4.decode(video=0)])


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def clips(folder: Path) -> list[np.ndarray]:
    return [frames(folder / record["file"]) for record in records(folder)]


@pytest.fixture(scope="module")
def arguments(finished_run: Path) -> list[object]:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return ["--checkpoint", finished_run / "final", *prompts, "--seed", 7, "--device", "cpu"]


@pytest.fixture(scope="module")
def samples(shell: Command, arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes in a process of its own."""
    folder = tmp_path_factory.mktemp("samples") / "new" / "folder"
    result = shell("sample.py", *arguments, "--output_dir", folder)
    assert result.code == 0, result
    assert f"wrote 2 clips, samples.jsonl and contact_sheet.png to {folder}" in result.out
    return folder


def test_the_files_play_in_a_browser(samples: Path) -> None:
    names = ["00000-pushing-a-red-ball-from-left-to-right.mp4", "00001-holding-a-blue-cup.mp4"]
    assert {path.name for path in samples.iterdir()} == {*names, "samples.jsonl", "contact_sheet.png"}
    for name in names:
        with av.open(str(samples / name)) as mp4:
            (stream,) = mp4.streams
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height, float(stream.average_rate)) == (16, 16, 8.0)
            assert len(list(mp4.decode(video=0))) == 4
    sheet = cv2.imread(str(samples / "contact_sheet.png"))
    assert sheet is not None and sheet.shape[0] > 2 * 16 and sheet.shape[1] >= 4 * 16


def test_the_records_are_those_of_the_contract(samples: Path, finished_run: Path) -> None:
    for number, record in enumerate(records(samples)):
        assert record.keys() == KEYS
        assert (record["prompt"], record["seed"]) == (PROMPTS[number], 7 + number)
        assert (record["num_frames"], record["height"], record["width"], record["fps"]) == (4, 16, 16, 8.0)
        assert (record["steps"], record["sampler"], record["eta"], record["guidance_scale"]) == (2, "ddim", 0.0, 2.0)
        assert (record["negative_prompt"], record["checkpoint"]) == ("", str(finished_run / "final"))


def test_the_same_arguments_give_the_same_bytes(
    command: Command, arguments: list[object], samples: Path, tmp_path: Path
) -> None:
    assert command("sample.py", *arguments, "--output-dir", tmp_path).code == 0
    for record in records(samples):
        assert (tmp_path / record["file"]).read_bytes() == (samples / record["file"]).read_bytes()
    assert (tmp_path / "samples.jsonl").read_text() == (samples / "samples.jsonl").read_text()
    assert (tmp_path / "contact_sheet.png").read_bytes() == (samples / "contact_sheet.png").read_bytes()


def test_another_seed_or_prompt_gives_another_clip(command: Command, finished_run: Path, tmp_path: Path) -> None:
    seen = set()
    for seed, prompt in ((1, PROMPTS[0]), (2, PROMPTS[0]), (1, PROMPTS[1])):
        folder = tmp_path / f"{seed}{prompt}"
        arguments = ("--checkpoint", finished_run / "final", "--prompt", prompt, "--seed", seed)
        assert command("sample.py", *arguments, "--guidance_scale", 8, "--output_dir", folder).code == 0
        seen.add(clips(folder)[0].tobytes())
    assert len(seen) == 3


def test_a_training_checkpoint_samples_with_its_averaged_weights(
    command: Command, arguments: list[object], samples: Path, finished_run: Path, tmp_path: Path
) -> None:
    checkpoint = ["--checkpoint", finished_run / "checkpoint-20"]
    assert command("sample.py", *checkpoint, *arguments[2:], "--output_dir", tmp_path).code == 0
    for ours, theirs in zip(clips(tmp_path), clips(samples), strict=True):
        assert np.array_equal(ours, theirs)


def test_every_flag_reaches_the_model_and_the_record(command: Command, finished_run: Path, tmp_path: Path) -> None:
    flags = {
        "negative_prompt": "dark", "num_inference_steps": 3, "sampler": "ddim", "eta": 0.5, "guidance_scale": 1.5,
        "num_frames": 2, "height": 20, "width": 24, "fps": 4.0,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    (tmp_path / "prompts.txt").write_text("a red ball\n\n  a blue cup \n", encoding="utf-8")
    prompts = ("--prompt-file", tmp_path / "prompts.txt", "--num-videos-per-prompt", 2, "--batch-size", 3)
    out = tmp_path / "out"
    result = command("sample.py", "--checkpoint", finished_run / "final", *prompts, *words, "--output-dir", out)
    assert result.code == 0, result.err
    expected = {**{key: value for key, value in flags.items() if key != "num_inference_steps"}, "steps": 3}
    log = records(out)
    assert [record["prompt"] for record in log] == ["a red ball"] * 2 + ["a blue cup"] * 2
    assert [record["seed"] for record in log] == [0, 1, 2, 3]
    for record, clip in zip(log, clips(out), strict=True):
        assert {key: record[key] for key in expected} == expected
        assert clip.shape == (2, 20, 24, 3)
    assert len({clip.tobytes() for clip in clips(out)}) == 4


def test_without_a_checkpoint_the_shipped_model_makes_the_built_in_prompts(command: Command, tmp_path: Path) -> None:
    result = command("sample.py", "--steps", 1, "--num_frames", 2, "--output_dir", tmp_path)
    assert result.code == 0, result.err
    log = records(tmp_path)
    assert [record["prompt"] for record in log] == list(PROMPTS_BUILT_IN)
    assert {record["checkpoint"] for record in log} == {"demo"}
    assert [clip.shape for clip in clips(tmp_path)] == [(2, 64, 64, 3)] * len(log)
