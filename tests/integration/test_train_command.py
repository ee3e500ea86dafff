"""`train.py`: what a whole run leaves in its folder, and every kind of data that it trains on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import av
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vdm.checkpoint import read_manifest, verify
from vdm.config import load
from vdm.data.mini_something import write_ssv2

Command = Callable[..., Any]
FIXTURES = Path(__file__).parents[1] / "fixtures"
TOLD = {"step": 20, "task": "unet", "val_loss": ANY, "seconds": ANY, "clips_per_step": 2}
TINY = FIXTURES / "tiny.yaml"
SHORT = ("max_train_steps=2", "training.validation_steps=2")


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- the run folder


def test_the_run_folder_is_complete(finished_run: Path) -> None:
    assert {path.name for path in finished_run.iterdir() if not path.name.startswith(".")} == {
        "config.yaml", "environment.json", "log.jsonl", "tensorboard", "samples", "checkpoint-10", "checkpoint-20",
        "final",
    }  # fmt: skip
    weights = {"unet", "vae", "text"}
    for name, parts, info in (
        (
            "checkpoint-20",
            weights | {"unet.ema", "text.ema"},
            TOLD,
        ),
        ("final", weights, {"step": 20, "task": "unet"}),
    ):
        manifest = verify(finished_run / name)
        assert set(manifest.parts) == parts
        assert manifest.info == info
        assert ("trainer.pt" in manifest.files) is (name != "final")


def test_the_config_is_resolved_and_loads_back(finished_run: Path) -> None:
    expected = load(TINY, [f"run_dir={finished_run}"])
    for path in (finished_run, finished_run / "final", finished_run / "checkpoint-10"):
        assert load(path / "config.yaml") == expected
    assert "adam_beta2: 0.999" in (finished_run / "config.yaml").read_text(encoding="utf-8"), "every default is there"


def test_the_log_has_one_object_a_line(finished_run: Path) -> None:
    log = records(finished_run)
    assert [record["step"] for record in log] == list(range(1, 21))
    for record in log:
        assert {"loss", "lr", "grad_norm", "videos_per_second"} <= record.keys()
        assert record.pop("skipped_steps") == 0 and all(value > 0 for value in record.values())
        assert ("val_loss" in record) is (record["step"] in (10, 20))


def test_tensorboard_shows_the_log(finished_run: Path) -> None:
    board = EventAccumulator(str(finished_run / "tensorboard")).Reload()
    assert {"loss", "lr", "grad_norm", "videos_per_second", "val_loss"} <= set(board.Tags()["scalars"])
    shown = {event.step: event.value for event in board.Scalars("loss")}
    assert shown == pytest.approx({int(record["step"]): record["loss"] for record in records(finished_run)}, rel=1e-5)


def test_previews_are_clips_and_a_contact_sheet(finished_run: Path) -> None:
    assert {path.name for path in (finished_run / "samples").iterdir()} == {"step-000010", "step-000020"}
    for folder in (finished_run / "samples").iterdir():
        assert {path.name for path in folder.iterdir()} == {"00.mp4", "contact_sheet.png", "captions.json"}
        with av.open(str(folder / "00.mp4")) as mp4:
            assert mp4.streams.video[0].codec_context.name == "h264"
            assert len(list(mp4.decode(video=0))) == 4


# ---- other data, other tasks


def test_clips_that_synth_wrote_train_through_the_real_loader(command: Command, tmp_path: Path) -> None:
    root, run_dir = tmp_path / "clips", tmp_path / "run"
    arguments = ("--num_clips", 6, "--size", 16, "--num-frames", 4, "--fps", 8)
    synth = command("vdm", "data", "synth", root, *arguments)
    assert synth.code == 0 and f"wrote 6 clips to {root}" in synth.out
    trained = command("train.py", TINY, f"run_dir={run_dir}", "data.format=ssv2", f"data.root={root}", *SHORT)
    assert trained.code == 0, trained.err
    assert len(records(run_dir)) == 2
    cached = command("train.py", TINY, f"run_dir={tmp_path / 'cached'}", "data.cache_latents=true", "data.format=ssv2",
                     f"data.root={root}", *SHORT)  # fmt: skip
    assert cached.code == 0, cached.err


def test_a_folder_of_videos_with_texts_trains(command: Command, tmp_path: Path) -> None:
    write_ssv2(tmp_path / "synth", num_clips=4, size=16, num_frames=4, fps=8.0, seed=0)
    root = tmp_path / "mine"
    root.mkdir()
    for number, path in enumerate(sorted((tmp_path / "synth" / "20bn-something-something-v2").iterdir())):
        path.rename(root / f"clip {number}.mp4")
        (root / f"clip {number}.txt").write_text(f"my clip {number}\n", encoding="utf-8")
    run_dir = tmp_path / "run"
    result = command("train.py", TINY, f"run_dir={run_dir}", "data.format=folder", f"data.root={root}", *SHORT)
    assert result.code == 0, result.err
    assert (run_dir / "final" / "manifest.json").is_file()


def test_a_few_unreadable_clips_are_named_once_and_left_out(command: Command, tmp_path: Path) -> None:
    root = tmp_path / "clips"
    write_ssv2(root, num_clips=6, size=16, num_frames=4, fps=8.0, seed=0)
    broken = min((root / "20bn-something-something-v2").iterdir())
    broken.write_bytes(b"no video at all")
    data = ("data.format=ssv2", f"data.root={root}", "data.max_bad_share=0.4")
    result = command("train.py", TINY, f"run_dir={tmp_path / 'run'}", *data, "max_train_steps=8")
    assert result.code == 0, result.err
    assert result.err.count(f"warning: clip {broken.stem} is left out: {broken.name} cannot be read") == 1
    [named] = [json.loads(line) for line in (tmp_path / "run" / "bad_clips.jsonl").read_text().splitlines()]
    assert named["id"] == broken.stem and named["split"] in ("train", "validation") and broken.name in named["reason"]


def test_the_flat_file_of_the_reference_trains_at_another_size(command: Command, tmp_path: Path) -> None:
    small = (
        "unet_dim=16", "channel_mult=[1]", "attention_levels=[true]", "num_res_blocks=1", "attention_head_dim=16",
        "norm_num_groups=4", "context_dim=16", "text_width=16", "text_heads=1", "text_layers=2", "vae_channels=[8, 8]",
        "vae_norm_num_groups=4", "layers_per_block=1", "num_clips=4", "data.height=16", "data.width=16",
        "data.min_frames=2", "data.max_frames=2", "sampling.height=16", "sampling.width=16", "mixed_precision=no",
        "batch_size=1", "effective_batch_size=4", "max_train_steps=1", "dataloader_num_workers=0", "validation_steps=0",
    )  # fmt: skip
    run_dir = tmp_path / "run"
    result = command("train.py", FIXTURES / "reference_flat.yaml", f"run_dir={run_dir}", *small)
    assert result.code == 0, result.err
    (record,) = records(run_dir)
    assert record["lr"] == pytest.approx(1e-7), "the first of 1,000 warm-up steps"


def test_an_autoencoder_trains_and_a_unet_on_it(command: Command, tmp_path: Path) -> None:
    vae, run_dir = tmp_path / "vae", tmp_path / "run"
    result = command("train.py", TINY, f"run_dir={vae}", "training.task=vae", *SHORT)
    assert result.code == 0, result.err
    assert {"loss", "reconstruction", "kl", "psnr", "val_psnr"} <= records(vae)[-1].keys()
    assert set(read_manifest(vae / "final").parts) == {"vae"}
    result = command("train.py", TINY, f"run_dir={run_dir}", f"vae.vae_weights={vae / 'final'}", *SHORT)
    assert result.code == 0, result.err
    ours, theirs = ((folder / "final" / "vae.safetensors").read_bytes() for folder in (vae, run_dir))
    assert ours == theirs
    alone = command("sample.py", "--checkpoint", vae / "final", "--output_dir", tmp_path / "out")
    assert "holds no weights of unet, only of vae" in alone.error


def test_a_text_tower_trains_and_a_unet_with_it(command: Command, tmp_path: Path) -> None:
    text, run_dir = tmp_path / "text", tmp_path / "run"
    result = command("train.py", TINY, f"run_dir={text}", "training.task=text", *SHORT)
    assert result.code == 0, result.err
    assert {"loss", "retrieval", "val_loss", "val_retrieval"} <= records(text)[-1].keys()
    assert set(read_manifest(text / "final").parts) == {"vae", "text", "contrast"}
    frozen = ("text.text_trainable=false", f"text.text_weights={text / 'final'}")
    result = command("train.py", TINY, f"run_dir={run_dir}", *frozen, *SHORT)
    assert result.code == 0, result.err
    ours, theirs = ((folder / "final" / "text.safetensors").read_bytes() for folder in (text, run_dir))
    assert ours == theirs
