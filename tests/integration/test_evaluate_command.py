"""`vdm evaluate` as a user runs it: clips against themselves, bad clips, comparison, several processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vdm.data.mini_something import write_ssv2
from vdm.data.video import read_clip
from vdm.metrics.similarity import frame_ssim
from vdm.metrics.toy import SHIPPED

Command = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
METRICS = "frame_ssim,action_accuracy,fvd_toy,kvd_toy,is_toy,fvd"
needs_classifier = pytest.mark.skipif(not SHIPPED.is_file(), reason=f"{SHIPPED.name} does not come with this vdm")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `vdm data synth` writes."""
    folder = tmp_path_factory.mktemp("evaluate") / "reference"
    write_ssv2(folder, num_clips=6, size=64, num_frames=16, fps=8.0, seed=3)
    return folder


def as_samples(reference: Path, folder: Path) -> Path:
    """The reference's own files as if they had been generated."""
    folder.mkdir(parents=True)
    entries = [
        entry for name in ("train", "validation") for entry in json.loads((reference / f"{name}.json").read_text())
    ]
    lines = []
    for number, entry in enumerate(entries):
        name = f"{number:05d}.mp4"
        shutil.copy(reference / "20bn-something-something-v2" / f"{entry['id']}.mp4", folder / name)
        size = {"num_frames": 16, "height": 64, "width": 64, "fps": 8.0}
        lines.append({"file": name, "prompt": entry["label"], "seed": number, **size})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def itself(reference: Path, shell: Command) -> Path:
    """The output of a whole evaluation of real clips against themselves."""
    samples, out = as_samples(reference, reference.parent / "samples"), reference.parent / "out"
    words = ("--generated", samples, "--reference", reference, "--output_dir", out, "--metrics", METRICS)
    result = shell("-m", "vdm", "evaluate", *words)
    assert result.code == 0, result
    assert f"wrote metrics.json, metrics.md, per_clip.jsonl and report.html to {out}" in result.out
    assert (out / "metrics.md").read_text() in result.out and "generated: 100%" in result.err
    return out


def records(out: Path) -> dict[str, Any]:
    return {record["metric"]: record for record in json.loads((out / "metrics.json").read_text())}


def test_real_clips_against_themselves(itself: Path) -> None:
    found = records(itself)
    clips = [read_clip(file, fps=8.0, num_frames=16) for file in sorted((itself.parent / "samples").glob("*.mp4"))]
    direct = frame_ssim(torch.from_numpy(np.stack(clips))).mean().item()
    ssim = found["frame_ssim"]
    assert ssim["value"] == pytest.approx(direct, abs=1e-14)
    assert ssim["value"] == pytest.approx(ssim["ceilings"]["reference"], abs=1e-14)
    assert ssim["ceilings"]["noise"] < ssim["ceilings"]["shuffled"] < ssim["value"] < ssim["ceilings"]["frozen"] == 1.0
    action = found["action_accuracy"]
    assert action["value"] == action["ceilings"]["reference"] > 0.7 > 0.4 > action["ceilings"]["shuffled"]
    fvd = found["fvd"]
    assert fvd["value"] is None and not fvd["valid"]
    assert fvd["status"].startswith("skipped: needs i3d_torchscript.pt, put it at weights/i3d_torchscript.pt")
    lines = [json.loads(line) for line in (itself / "per_clip.jsonl").read_text().splitlines()]
    assert all(line["distance"] == 0.0 for line in lines if line["side"] == "generated"), "every one is a copy"
    assert all(told["warnings"][0].startswith("6 of 6 generated clips are files of") for told in (ssim, action))
    assert "6 of 6 generated clips are nearer" in (itself / "report.html").read_text()


@needs_classifier
def test_distances_of_a_set_from_itself(itself: Path) -> None:
    found = records(itself)
    assert 0.0 <= found["fvd_toy"]["value"] < 1e-9 < found["fvd_toy"]["floor"]
    assert found["fvd_toy"]["value"] < min(found["fvd_toy"]["ceilings"].values())
    assert not any(found[name]["valid"] for name in ("fvd_toy", "kvd_toy", "is_toy")) and found["frame_ssim"]["valid"]
    assert not found["fvd_toy"]["valid"] and "fewer clips than features" in " ".join(found["fvd_toy"]["warnings"])
    assert found["kvd_toy"]["value"] < min(found["kvd_toy"]["ceilings"].values())
    assert found["is_toy"]["value"] == pytest.approx(found["is_toy"]["ceilings"]["reference"], rel=1e-9)
    assert 1.0 <= found["is_toy"]["value"] <= 6.0


def test_bad_clips_are_named_and_left_out(command: Command, reference: Path, tmp_path: Path) -> None:
    samples = as_samples(reference, tmp_path / "samples")
    (samples / "00004.mp4").write_bytes((samples / "00004.mp4").read_bytes()[:900])
    damaged = tmp_path / "reference"
    shutil.copytree(reference, damaged)
    first = sorted((damaged / "20bn-something-something-v2").glob("*.mp4"))[0]
    first.write_bytes(b"no video")
    words = (
        "--generated",
        samples,
        "--reference",
        damaged,
        "--output-dir",
        tmp_path / "out",
        "--metrics",
        "frame_ssim",
    )
    assert command("vdm", "evaluate", *words).code == 0
    record = records(tmp_path / "out")["frame_ssim"]
    assert (record["n_generated"], record["n_reference"]) == (5, 5)
    told = " ".join(record["warnings"])
    assert "00004.mp4 cannot be read" in told and f"{first.stem} cannot be read" in told
    assert record["protocol"]["warnings"] == record["warnings"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "per_clip.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines if line["problem"]) == sorted(["00004.mp4", first.stem])


def test_prompts_that_do_not_match_the_files_are_refused(command: Command, reference: Path, tmp_path: Path) -> None:
    samples = as_samples(reference, tmp_path / "samples")
    words = ("--generated", samples, "--reference", reference, "--output_dir", tmp_path / "out")
    lines = (samples / "samples.jsonl").read_text().splitlines()
    (samples / "samples.jsonl").write_text("\n".join(lines[:-1]))
    assert "holds 00005.mp4 without a prompt in samples.jsonl" in command("vdm", "evaluate", *words).error
    (samples / "samples.jsonl").write_text("\n".join([*lines, lines[0].replace("00000", "00099")]))
    assert "names 00099.mp4, which is not in" in command("vdm", "evaluate", *words).error
    (samples / "samples.jsonl").write_text("\n".join(lines))
    again = {**json.loads(lines[0]), "file": "00001.mp4"}
    (samples / "samples.jsonl").write_text("\n".join([lines[0], json.dumps(again), *lines[2:]]))
    assert "00000.mp4, 00001.mp4 in" in command("vdm", "evaluate", *words).error
    assert not (tmp_path / "out").exists()


def test_metrics_that_are_named_and_cannot_be_had_are_bad_input(
    command: Command, reference: Path, tmp_path: Path
) -> None:
    samples = as_samples(reference, tmp_path / "samples")
    words = ("--generated", samples, "--reference", reference, "--output_dir", tmp_path / "out", "--metrics")
    for none in ("", " , "):
        result = command("vdm", "evaluate", *words, none)
        assert result.code == 2 and "--metrics names no metric; leave it out to measure all" in result.error
    result = command("vdm", "evaluate", *words, "fvd,,kvd, ", "--weights_dir", tmp_path)
    assert result.code == 2 and "wrote metrics.json" in result.out
    assert "nothing that --metrics names could be measured: fvd is skipped: needs i3d_torchscript.pt" in result.error
    assert list(records(tmp_path / "out")) == ["fvd", "kvd"]
    assert command("vdm", "evaluate", *words, ",fvd,,frame_ssim", "--weights_dir", tmp_path).code == 0


def test_two_runs_are_compared(command: Command, itself: Path, reference: Path, tmp_path: Path) -> None:
    samples = as_samples(reference, tmp_path / "samples")
    for name in ("00003.mp4", "00005.mp4"):
        shutil.copy(itself.parent / "samples" / name, samples / f"swap-{name}")
    (samples / "swap-00003.mp4").replace(samples / "00005.mp4")
    (samples / "swap-00005.mp4").replace(samples / "00003.mp4")
    words = ("--generated", samples, "--reference", reference, "--output_dir", tmp_path / "out")
    assert command("vdm", "evaluate", *words, "--metrics", "frame_ssim,action_accuracy").code == 0
    result = command("vdm", "evaluate", "--compare", itself, tmp_path / "out", "--output_dir", tmp_path / "compared")
    assert result.code == 0 and f"| frame_ssim | {tmp_path}/out |" in result.out and "6 pairs" in result.out
    assert result.out.endswith(f"wrote compare.json and compare.html to {tmp_path / 'compared'}\n")
    found = {one["metric"]: one for one in json.loads((tmp_path / "compared" / "compare.json").read_text())}
    assert found["frame_ssim"]["difference"] == pytest.approx(0.0, abs=1e-12), "the same clips, under other prompts"
    assert found["action_accuracy"]["difference"] <= 0.0 and found["frame_ssim"]["num_pairs"] == 6

    page = (tmp_path / "compared" / "compare.html").read_text()
    assert page.count("data-curves") == len(found) == 2 and "Metrics by run" in page, "no training step is known"

    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    words = ("--generated", samples, "--reference", reference, "--output_dir", tmp_path / "other")
    assert command("vdm", "evaluate", *words, "--metrics", "frame_ssim", "--split", "train").code == 0
    assert records(tmp_path / "other")["frame_ssim"]["n_reference"] == 5, "one is for validation"
    result = command("vdm", "evaluate", "--compare", tmp_path / "out", tmp_path / "other")
    for words in ("frame_ssim was not measured alike", "split all, ", " and train, "):
        assert words in result.error
    assert len(content) == 2


@needs_classifier
def test_choices_of_protocol_are_in_the_record_and_part_what_was_measured_otherwise(
    command: Command, itself: Path, reference: Path, tmp_path: Path
) -> None:
    samples = as_samples(reference, tmp_path / "samples")
    lines = [json.loads(line) for line in (samples / "samples.jsonl").read_text().splitlines()]
    named = [json.dumps({**line, "checkpoint": "results/run/checkpoint-500"}) for line in lines]
    (samples / "samples.jsonl").write_text("\n".join(named))
    words = ("--generated", samples, "--reference", reference, "--output_dir", tmp_path / "out", "--cov", "biased")
    assert command("vdm", "evaluate", *words, "--metrics", "fvd_toy,kvd_toy").code == 0
    before, after = records(itself), records(tmp_path / "out")
    assert (before["fvd_toy"]["protocol"]["cov"], after["fvd_toy"]["protocol"]["cov"]) == ("unbiased", "biased")
    assert after["fvd_toy"]["floor"] == pytest.approx(before["fvd_toy"]["floor"] * 2 / 3, rel=0.2), "of 3 clips a side"
    assert after["kvd_toy"]["protocol_hash"] == before["kvd_toy"]["protocol_hash"]
    assert after["kvd_toy"]["protocol"]["checkpoint"] == "results/run/checkpoint-500"
    result = command("vdm", "evaluate", "--compare", itself, tmp_path / "out")
    assert result.code == 2 and "fvd_toy was not measured alike" in result.error
    assert "cov unbiased and biased" in result.error
    result = command("vdm", "evaluate", *words[:-2], "--cov", "half")
    assert result.code == 2 and "invalid choice: 'half'" in result.error


def test_the_selftest_says_what_is_there_and_what_is_off(command: Command, tmp_path: Path) -> None:
    result = command("vdm", "evaluate", "--selftest", "--weights_dir", tmp_path)
    assert result.code == 0
    for name in ("i3d_torchscript.pt", "i3d_pretrained_400.pt", "ViT-B-32.pt", "dino_vitbase16_pretrain.pth"):
        assert f"{name}: file: expected there, found not there" in result.out
    (tmp_path / "ViT-B-32.pt").write_bytes(b"another file")
    result = command("vdm", "evaluate", "--selftest", "--weights_dir", tmp_path)
    assert result.code == 1 and "OFF  ViT-B-32.pt: sha256: expected 40d365715913c9da" in result.out
    assert f"error: ViT-B-32.pt in {tmp_path} gives other values than it should" in result.err


@pytest.mark.slow
def test_two_processes_write_what_one_does(itself: Path, reference: Path, tmp_path: Path) -> None:
    words = ("--generated", itself.parent / "samples", "--reference", reference, "--output_dir", tmp_path)
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "vdm", "evaluate")
    done = subprocess.run(
        [sys.executable, *launch, *map(str, words), "--metrics", METRICS],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done
    for name in ("metrics.json", "metrics.md", "per_clip.jsonl", "report.html"):
        assert (tmp_path / name).read_bytes() == (itself / name).read_bytes(), name
