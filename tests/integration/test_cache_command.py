"""`vdm data cache`, and training from what it writes."""

from __future__ import annotations

import gc
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vdm import precompute
from vdm.components import build_text_encoder, load_part
from vdm.config import load
from vdm.data.cache import look_name
from vdm.data.mini_something import write_ssv2
from vdm.models import VideoVAE
from vdm.text.encoder import TextEncoder
from vdm.training.kinds import build_task
from vdm.training.loop import train
from vdm.training.trainer import Trainer
from vdm.weights import open_weights

Command = Callable[..., Any]
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "fixtures" / "tiny.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty small clips in SSv2 layout."""
    root = tmp_path_factory.mktemp("ssv2") / "set"
    write_ssv2(root, num_clips=30, size=24, num_frames=10, fps=8, seed=0)
    return root


def overrides(root: Path, *more: str) -> list[str]:
    """A run on these clips with a frozen text tower and windows of several lengths."""
    return [
        "data.format=ssv2", f"data.root={root}", "data.num_clips=null", "data.min_frames=2", "data.max_frames=6",
        "data.crop=centre", "text.text_trainable=false", "training.validation_steps=5", *more,
    ]  # fmt: skip


def losses(run_dir: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of that run, in full precision."""
    folder = tmp_path_factory.mktemp("made") / "cache"
    config = load(TINY, overrides(root))
    precompute.write_cache(config, folder, dtype=torch.float32, device=CPU)
    return folder


def test_the_first_twenty_losses_are_those_of_the_files(root: Path, made: Path, tmp_path: Path) -> None:
    """Augmentation off: the same noise, the same windows. A VAE adds up a batch of two otherwise than one clip."""
    for name, more in (("files", ()), ("cache", (f"data.cache_dir={made}",))):
        train(load(TINY, overrides(root, *more, f"run_dir={tmp_path / name}")))
    assert len(losses(tmp_path / "files")) == 20
    assert losses(tmp_path / "cache") == pytest.approx(losses(tmp_path / "files"), rel=1e-5)
    assert losses(tmp_path / "cache", "val_loss") == pytest.approx(losses(tmp_path / "files", "val_loss"), rel=1e-5)
    for part in ("vae", "text"):
        ours, theirs = (tmp_path / name / "final" / f"{part}.safetensors" for name in ("cache", "files"))
        assert ours.read_bytes() == theirs.read_bytes(), "the finished model has the parts that training did without"
    assert (tmp_path / "cache" / "samples" / "step-000020" / "00.mp4").is_file()


def test_half_precision_moves_the_losses_by_a_thousandth(root: Path, command: Command, tmp_path: Path) -> None:
    done = command("vdm", "data", "cache", TINY, *overrides(root), f"data.cache_dir={tmp_path / 'cache'}")
    assert done.code == 0 and f"train from it with data.cache_dir={tmp_path / 'cache'}" in done.out
    for name, more in (("files", ()), ("run", (f"data.cache_dir={tmp_path / 'cache'}",))):
        train(load(TINY, overrides(root, *more, "max_train_steps=5", f"run_dir={tmp_path / name}")))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "files"), rel=2e-3)
    assert losses(tmp_path / "run") != losses(tmp_path / "files")


def test_the_disk_that_it_takes_is_said_before(root: Path, command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    done = command(
        "vdm", "data", "cache", TINY, *overrides(root, "data.horizontal_flip=0.5"), f"data.cache_dir={folder}"
    )
    told = re.match(
        r"cache .*: 27 clips in up to 2 looks, 3 to validate, 1.5 kB a look, 87.6 kB; (\d+) texts, ([\d.]+) kB; "
        r"at most ([\d.]+) kB in all, of which 0.0 kB are there; [\d.]+ GB are free\n",
        done.out,
    )
    assert told, done.out
    payload = sum(len(content) - 8 - int.from_bytes(content[:8], "little") for content in shards(folder).values())
    assert payload <= float(told[3]) * 1000 <= 1.1 * payload


def test_no_vae_and_no_frozen_text_tower_are_in_memory(root: Path, made: Path, tmp_path: Path) -> None:
    def alive() -> list[type]:
        gc.collect()
        return [type(thing) for thing in gc.get_objects() if issubclass(type(thing), VideoVAE | TextEncoder)]

    assert not alive(), "of other tests"
    config = load(TINY, overrides(root, f"data.cache_dir={made}", f"run_dir={tmp_path}"))
    trainer = Trainer(config, build_task(config, CPU), tmp_path)
    stream = trainer.train_batches()
    trainer.train_step([next(stream)])
    trainer.validate()
    trainer.save()
    trainer.train_step([next(stream)])
    assert not alive()
    assert set(trainer.task.modules) == {"unet"}
    assert {file.stem for file in (tmp_path / "checkpoint-1").glob("*.safetensors")} == {
        "unet",
        "unet.ema",
        "vae",
        "text",
    }


def test_a_trainable_tower_is_kept_and_trained(root: Path, tmp_path: Path) -> None:
    for task in ("unet", "text"):
        more = ("text.text_trainable=true", f"data.cache_dir={tmp_path / task}", f"training.task={task}")
        config = load(TINY, [*overrides(root, *more), "max_train_steps=3", f"run_dir={tmp_path / f'{task}-run'}"])
        precompute.write_cache(config, tmp_path / task, dtype=torch.float32, device=CPU)
        assert not list((tmp_path / task).glob("text-*")), "its contexts change"
        tower = build_text_encoder(config)
        before = tower.tower.positional_embedding.detach().clone()
        load_part(tower, train(config), "text")
        assert not torch.equal(tower.tower.positional_embedding, before), "it has learned"


def test_every_crop_is_there(root: Path, tmp_path: Path) -> None:
    config = load(TINY, overrides(root, "data.crop=random", "data.cache_crops=3"))
    precompute.write_cache(config, tmp_path / "cache", dtype=torch.float32, device=CPU)
    names = {name for file in (tmp_path / "cache").glob("train-*.safetensors") for name in open_weights(file)}
    assert {look_name(index, crop, False) for index in range(27) for crop in range(3)} <= names


@pytest.mark.slow
def test_a_killed_run_from_a_cache_goes_on_to_the_bit(root: Path, made: Path, tmp_path: Path) -> None:
    """Its frozen parts come from the checkpoint then, for what they were made from may be gone."""
    vae = train(load(TINY, ["training.task=vae", "max_train_steps=2", f"run_dir={tmp_path / 'vae'}"]))
    cache = tmp_path / "cache"
    common = overrides(root, f"vae.vae_weights={vae}", f"data.cache_dir={cache}", "checkpointing_steps=5")
    precompute.write_cache(load(TINY, common), cache, dtype=torch.float16, device=CPU)
    whole = train(load(TINY, [*common, "max_train_steps=10", f"run_dir={tmp_path / 'whole'}"]))
    (tmp_path / "half").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "half" / "checkpoint-5")
    shutil.rmtree(vae)
    half = load(TINY, [*common, "max_train_steps=10", "keep_checkpoints=1", f"run_dir={tmp_path / 'half'}"])
    again = train(half, resume="latest")
    for part in ("unet", "vae", "text"):
        assert (again / f"{part}.safetensors").read_bytes() == (whole / f"{part}.safetensors").read_bytes()


def test_started_again_it_does_nothing_and_cut_short_it_goes_on(
    root: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompute, "MOST_CLIPS", 4)
    arguments = ("data", "cache", TINY, *overrides(root), f"data.cache_dir={tmp_path / 'cache'}")
    assert command("vdm", *arguments).code == 0
    whole = shards(tmp_path / "cache")
    assert len(whole) == 7 + 1 + 1
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    assert command("vdm", *arguments).code == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times, "all was there"
    for name in ("train-00002", "train-00006", "text-00000"):
        (tmp_path / "cache" / f"{name}.safetensors").unlink()
    assert command("vdm", *arguments).code == 0
    assert shards(tmp_path / "cache") == whole


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on(root: Path, shell: Command, tmp_path: Path) -> None:
    """In a process of its own; the end is that of a run that was let be."""
    script = (
        "import sys; sys.argv[0] = 'vdm'; from vdm import cli, precompute; precompute.MOST_CLIPS = 1; "
        "raise SystemExit(cli.main())"
    )
    arguments = ["-c", script, "data", "cache", str(TINY), *overrides(root, "data.dataloader_num_workers=1")]
    with subprocess.Popen(
        [sys.executable, *arguments, f"data.cache_dir={tmp_path / 'cut'}"], cwd=ROOT, stderr=subprocess.DEVNULL
    ) as process:
        while len(list((tmp_path / "cut").glob("train-*.safetensors"))) < 7 and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not json.loads((tmp_path / "cut" / "cache.json").read_text())["whole"]
    for name in ("cut", "let be"):
        done = shell(*arguments, f"data.cache_dir={tmp_path / name}")
        assert done.code == 0, done
    assert shards(tmp_path / "cut") == shards(tmp_path / "let be")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("data.height=32", "is stale: data.height was 16 and is 32; "),
        ("data.horizontal_flip=0.5", "is stale: data.horizontal_flip above 0 was false and is true; "),
        ("data.crop=random", 'is stale: data.crop was "centre" and is "random"; '),
        ("data.num_clips=9", "is stale: data.num_clips was null and is 9; "),
        ("seed=1", "is stale: the VAE's encoder was "),  # of random weights
        ("vae.vae_weights=VAE", "is stale: the VAE's encoder was "),
        ("text.text_trainable=true", "is stale: the text tower was "),
    ],
)
def test_a_stale_cache_is_refused_with_the_reason(
    root: Path, made: Path, command: Command, tmp_path: Path, change: str, sentence: str
) -> None:
    if change.endswith("VAE"):
        vae = train(load(TINY, ["training.task=vae", "max_train_steps=1", f"run_dir={tmp_path / 'vae'}"]))
        change = f"vae.vae_weights={vae}"
    arguments = (TINY, *overrides(root), change, f"data.cache_dir={made}")
    assert sentence in command("train.py", *arguments, f"run_dir={tmp_path / 'run'}").error
    assert sentence in command("vdm", "data", "cache", *arguments).error
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "change", ["data.min_frames=4", "data.dataloader_num_workers=1", "training.batch_size=3", "vae.scaling_factor=0.5"]
)
def test_what_does_not_touch_it_may_change(root: Path, made: Path, tmp_path: Path, change: str) -> None:
    train(load(TINY, [*overrides(root), change, f"data.cache_dir={made}", "max_train_steps=1", f"run_dir={tmp_path}"]))


@pytest.mark.slow
def test_bad_clips_are_named_and_replaced_as_they_are_from_files(root: Path, command: Command, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    file = next(copy.glob("*/4.mp4"))
    file.write_bytes(b"no video")
    common = overrides(copy, "data.max_bad_share=0.2", "max_train_steps=14")
    done = command("vdm", "data", "cache", TINY, *common, f"data.cache_dir={tmp_path / 'cache'}", "--dtype", "fp32")
    assert done.code == 0 and "warning: clip 4 is left out: 4.mp4 cannot be read" in done.err
    for name, more in (("files", ()), ("run", (f"data.cache_dir={tmp_path / 'cache'}",))):
        train(load(TINY, [*common, *more, f"run_dir={tmp_path / name}"]))
    ours, theirs = ((tmp_path / name / "bad_clips.jsonl").read_text() for name in ("run", "files"))
    assert ours == theirs and json.loads(ours)["id"] == "4"
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "files"), rel=1e-5)
    refused = command(
        "vdm", "data", "cache", TINY, *overrides(copy, "data.max_bad_share=0.01"), f"data.cache_dir={tmp_path / 'c'}"
    )
    assert "1 of 27 clips (4 %) cannot be read (first: 4: 4.mp4 cannot be read" in refused.error


def test_bad_input_is_one_sentence(
    root: Path, made: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ("vdm", "data", "cache", TINY, *overrides(root))
    assert "learns from pixels" in command(*cache, "training.task=vae", f"data.cache_dir={tmp_path / 'c'}").error
    assert (
        "learns from pixels"
        in command("train.py", TINY, "training.task=vae", f"data.cache_dir={made}", f"run_dir={tmp_path / 'r'}").error
    )
    assert (
        "is no cache; make it with: vdm data cache"
        in command("train.py", TINY, "data.cache_dir=nowhere", f"run_dir={tmp_path / 'r'}").error
    )
    assert "crops of data.crop=centre are all one" in command(*cache, "data.cache_crops=2").error
    assert "data.cache_crops must be at least 1" in command(*cache, "data.cache_crops=0").error
    assert "cannot be written" in command(*cache, "data.cache_dir=/proc/cache").error
    assert (
        "--device nonsense cannot be used here"
        in command(*cache, "--device", "nonsense", f"data.cache_dir={tmp_path / 'c'}").error
    )
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "has too little room for the cache" in command(*cache, f"data.cache_dir={tmp_path / 'd'}").error


def test_a_cache_of_other_clips_or_captions_is_refused(root: Path, command: Command, tmp_path: Path) -> None:
    copy, cache = tmp_path / "copy", f"data.cache_dir={tmp_path / 'cache'}"
    shutil.copytree(root, copy)
    arguments = (TINY, *overrides(copy), cache)
    assert command("vdm", "data", "cache", *arguments).code == 0
    moved = tmp_path / "moved"
    copy.rename(moved)
    common = (TINY, *overrides(moved), cache, "max_train_steps=1")
    assert command("train.py", *common, f"run_dir={tmp_path / 'a'}").code == 0, "the same clips elsewhere"
    gone = command("train.py", *arguments, "max_train_steps=1", f"run_dir={tmp_path / 'b'}")
    assert gone.code == 0 and f"the clips of data.root={copy} are not here" in gone.err

    video = next(moved.glob("*/7.mp4"))
    was = video.read_bytes()
    shutil.copy(next(moved.glob("*/8.mp4")), video)
    sentence = "is stale: it was made of other clips or captions than data.root="
    assert sentence in command("train.py", *common, f"run_dir={tmp_path / 'c'}").error
    assert "was begun with other clips" in command("vdm", "data", "cache", *common).error
    video.write_bytes(was)
    assert command("train.py", *common, f"run_dir={tmp_path / 'd'}").code == 0
    for labels in moved.rglob("*.json"):
        labels.write_text(labels.read_text().replace("red", "blue"))
    assert sentence in command("train.py", *common, f"run_dir={tmp_path / 'e'}").error


def test_damaged_and_exchanged_shards_are_named(root: Path, command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    arguments = (TINY, *overrides(root), f"data.cache_dir={folder}")
    assert command("vdm", "data", "cache", *arguments).code == 0
    good = shards(folder)
    damages = {
        "train-00000": good["validation-00000.safetensors"],
        "text-00000": good["text-00000.safetensors"][:3000],
        "validation-00000": b"",
    }
    for name, content in damages.items():
        path = folder / f"{name}.safetensors"
        path.write_bytes(content)
        for told in (
            command("train.py", *arguments, f"run_dir={tmp_path / 'r'}"),
            command("vdm", "data", "cache", *arguments),
        ):
            assert f"{path} is damaged (" in told.error and "remove it, and vdm data cache makes it anew" in told.error
        path.unlink()
        assert command("vdm", "data", "cache", *arguments).code == 0 and shards(folder) == good


def test_another_precision_is_another_cache(root: Path, made: Path, command: Command) -> None:
    told = command("vdm", "data", "cache", TINY, *overrides(root), f"data.cache_dir={made}", "--dtype", "bf16")
    assert "holds float32; give the same --dtype, or another data.cache_dir" in told.error
    whole = command("vdm", "data", "cache", TINY, *overrides(root), f"data.cache_dir={made}", "--dtype", "fp32")
    assert whole.code == 0 and "is whole already" in whole.out
