"""From a request to files: what a clip depends on, what its file is called, and what its record says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vdm import generate as module
from vdm.components import build_components
from vdm.config import load
from vdm.data.transforms import Crop
from vdm.data.video import read_clip, write_video
from vdm.errors import Failure, UserError
from vdm.generate import PROMPTS, Request, generate, read_prompts, slug
from vdm.pipeline import TextToVideo

TINY = Path(__file__).parent / "fixtures" / "tiny.yaml"
CLIPS = ("one red ball", "two blue cups", "three")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with every layer stirred, and a decoder of enough contrast to see it."""
    config = load(TINY, ["sampling.negative_prompt=dark", "sampling.sampling_fps=5"])
    pipe = TextToVideo(config, build_components(config))
    stir = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*pipe.unet.parameters(), *pipe.text_encoder.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=stir)
        pipe.vae.decoder.out[-1].weight *= 5.0  # type: ignore[operator, union-attr]
    folder = tmp_path_factory.mktemp("model") / "model"
    pipe.save_pretrained(folder)
    return folder


def make(model: Path, out: Path, **options: Any) -> list[np.ndarray]:
    """The clips of a request, as their files hold them."""
    options.setdefault("prompts", CLIPS)
    files = generate(Request(checkpoint=model, output_dir=out, device="cpu", **options))
    return [read_clip(file, fps=5.0, num_frames=4, start=0.0) for file in files]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The frames of every clip before it is encoded, uint8 (T,H,W,3)."""
    seen: list[np.ndarray] = []
    write = module.write_video

    def record(path: Path, frames: np.ndarray, *, fps: float) -> None:
        seen.append(frames)
        write(path, frames, fps=fps)

    monkeypatch.setattr(module, "write_video", record)
    return seen


# ---- what a clip depends on


@pytest.mark.parametrize("options", [{}, {"sampler": "ddpm", "steps": 3}, {"eta": 1.0, "steps": 3}])
def test_a_clip_does_not_depend_on_the_batch_size(
    model: Path, tmp_path: Path, shown: list[np.ndarray], options: dict[str, Any]
) -> None:
    """But for one level of 255 in a few places: a larger batch sums in another order."""
    for size in (1, 3, 2):
        make(model, tmp_path / str(size), batch_size=size, **options)
    one, three, two = shown[:3], shown[3:6], shown[6:]
    for alone, *others in zip(one, three, two, strict=True):
        assert alone.std() > 5.0
        for other in others:
            difference = np.abs(alone.astype(int) - other.astype(int))
            assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    assert records(tmp_path / "1") == records(tmp_path / "3")


def test_a_clip_depends_on_its_own_seed_alone(model: Path, tmp_path: Path, shown: list[np.ndarray]) -> None:
    """Clip i has seed + i, whatever was made before it."""
    make(model, tmp_path / "all", seed=4)
    make(model, tmp_path / "last", seed=6, prompts=CLIPS[2:])
    difference = np.abs(shown[2].astype(int) - shown[3].astype(int))
    assert difference.max() <= 1
    assert [record["seed"] for record in records(tmp_path / "all")] == [4, 5, 6]


def test_the_same_request_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    make(model, tmp_path / "a")
    torch.manual_seed(2)
    make(model, tmp_path / "b")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert len(names) == 5
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"steps": 5},
        {"sampler": "ddpm", "steps": 3},
        {"eta": 1.0, "steps": 3},
        {"guidance_scale": 8.0},
        {"negative_prompt": "bright", "guidance_scale": 8.0},
        {"prompts": ("four", "five", "six"), "guidance_scale": 8.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_choice_changes_the_clip(
    model: Path, tmp_path: Path, shown: list[np.ndarray], change: dict[str, Any]
) -> None:
    base = {key: value for key, value in change.items() if key in ("steps", "guidance_scale") and len(change) > 1}
    make(model, tmp_path / "a", **base)
    make(model, tmp_path / "b", **change)
    assert not np.array_equal(shown[0], shown[3])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_precision_gives_about_the_same_clip(
    model: Path, tmp_path: Path, shown: list[np.ndarray], dtype: str
) -> None:
    make(model, tmp_path / "fp32", prompts=("ball",))
    make(model, tmp_path / dtype, prompts=("ball",), dtype=dtype)
    difference = np.abs(shown[0].astype(int) - shown[1].astype(int))
    assert difference.mean() < 8.0
    assert bool(difference.max() > 0) is (dtype != "fp32")


# ---- what is written


def test_files_are_numbered_and_named_after_their_prompts(model: Path, tmp_path: Path) -> None:
    files = generate(
        Request(("A Red Ball!", "\u7403"), model, output_dir=tmp_path / "x", num_videos_per_prompt=2, batch_size=3)
    )
    names = ["00000-a-red-ball.mp4", "00001-a-red-ball.mp4", "00002-clip.mp4", "00003-clip.mp4"]
    assert [file.name for file in files] == names
    assert {path.name for path in (tmp_path / "x").iterdir()} == {*names, "samples.jsonl", "contact_sheet.png"}
    assert [record["file"] for record in records(tmp_path / "x")] == names
    assert [record["prompt"] for record in records(tmp_path / "x")] == ["A Red Ball!"] * 2 + ["\u7403"] * 2


def test_a_record_spells_out_what_was_left_to_the_model(model: Path, tmp_path: Path) -> None:
    make(model, tmp_path, prompts=("ball",))
    assert records(tmp_path) == [
        {
            "file": "00000-ball.mp4", "prompt": "ball", "seed": 0, "negative_prompt": "dark", "steps": 2, "eta": 0.0,
            "sampler": "ddim", "guidance_scale": 2.0, "num_frames": 4, "height": 16, "width": 16, "fps": 5.0,
            "checkpoint": str(model),
        }
    ]  # fmt: skip


def test_a_record_says_what_was_asked_for(model: Path, tmp_path: Path) -> None:
    wishes: dict[str, Any] = {
        "negative_prompt": "", "steps": 1, "sampler": "ddpm", "eta": 0.0, "guidance_scale": 0.0, "num_frames": 2,
        "height": 24, "width": 20, "fps": 12.0, "seed": 3,
    }  # fmt: skip
    make(model, tmp_path, prompts=("ball",), **wishes)
    (record,) = records(tmp_path)
    assert {key: record[key] for key in wishes} == wishes


def test_a_second_request_replaces_the_records(model: Path, tmp_path: Path) -> None:
    make(model, tmp_path)
    make(model, tmp_path, prompts=("ball",))
    assert [record["file"] for record in records(tmp_path)] == ["00000-ball.mp4"]
    assert not list(tmp_path.glob(".*"))


def test_what_is_cut_short_has_records_of_what_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of nothing else: the files of an earlier request that it has written over are not that request's any more."""
    make(model, tmp_path, seed=7)
    sampled = module._sampled

    def cut_short(pipe: TextToVideo, request: Request, prompts: list[str], seeds: list[int], _: None) -> torch.Tensor:
        if 2 in seeds:
            raise KeyboardInterrupt
        return sampled(pipe, request, prompts, seeds, None)

    monkeypatch.setattr(module, "_sampled", cut_short)
    with pytest.raises(KeyboardInterrupt):
        make(model, tmp_path, batch_size=1)
    assert [(record["file"], record["seed"]) for record in records(tmp_path)] == [
        ("00000-one-red-ball.mp4", 0), ("00001-two-blue-cups.mp4", 1)
    ]  # fmt: skip


def test_a_clip_that_cannot_be_written_costs_no_other_its_record(model: Path, tmp_path: Path) -> None:
    (tmp_path / "00001-two-blue-cups.mp4").mkdir()
    with pytest.raises(UserError, match="cannot write .*00001-two-blue-cups.mp4"):
        make(model, tmp_path)
    assert [record["file"] for record in records(tmp_path)] == ["00000-one-red-ball.mp4", "00002-three.mp4"]


def test_a_request_that_fails_at_once_leaves_the_records_of_an_earlier_one(model: Path, tmp_path: Path) -> None:
    make(model, tmp_path)
    before = records(tmp_path)
    with pytest.raises(UserError):
        make(model, tmp_path, height=7)
    assert records(tmp_path) == before


def test_the_contact_sheet_is_of_the_first_clips(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(model, tmp_path / "two", prompts=CLIPS[:2], batch_size=2)
    monkeypatch.setattr(module, "SHEET_CLIPS", 2)
    make(model, tmp_path / "three", batch_size=2)
    two, three = ((tmp_path / name / "contact_sheet.png").read_bytes() for name in ("two", "three"))
    assert two == three and len(records(tmp_path / "three")) == 3


# ---- prompts and names


def test_prompts_are_read_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff first \r\n\r\n\u7403 second\n\t\nthird".encode())
    assert read_prompts(path) == ("first", "\u7403 second", "third")


@given(st.text(max_size=200))
def test_a_slug_is_a_plain_file_name(prompt: str) -> None:
    name = slug(prompt)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert len(name) <= 60


def test_the_built_in_prompts_have_names_of_their_own() -> None:
    assert len({slug(prompt) for prompt in PROMPTS}) == len(PROMPTS)


# ---- what is refused


def test_the_output_folder_is_tried_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextToVideo, "from_pretrained", lambda path: pytest.fail("minutes are spent"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="output folder .* cannot be written"):
            generate(Request(CLIPS, output_dir=folder))


def test_settings_without_a_flag_are_given_as_overrides(model: Path, tmp_path: Path) -> None:
    plain, rescaled = (
        make(model, tmp_path / name, prompts=("ball",), overrides=overrides)[0]
        for name, overrides in (("plain", ()), ("rescaled", ("sampling.guidance_rescale=1.0", "sampling.eta=0.0")))
    )
    assert not np.array_equal(plain, rescaled)
    (record,) = records(tmp_path / "rescaled")
    assert record["overrides"] == ["sampling.guidance_rescale=1.0", "sampling.eta=0.0"]
    assert "overrides" not in records(tmp_path / "plain")[0]
    for wrong, sentence in (
        ("model.unet_dim=8", "'model.unet_dim=8' is no setting of sampling"),
        ("sampling.guidence_scale=2", "unknown key sampling.guidence_scale; did you mean guidance_scale"),
    ):
        with pytest.raises(UserError, match=sentence):
            make(model, tmp_path / "wrong", overrides=(wrong,))


def test_a_clip_may_be_started_from(model: Path, tmp_path: Path, shown: list[np.ndarray]) -> None:
    """A video of any size, cut and brought to the one wanted, or a picture, which stands still."""
    pictures = np.random.default_rng(0).integers(0, 256, (4, 4, 6, 3), dtype=np.uint8)
    pictures = np.stack([cv2.resize(picture, (60, 40)) for picture in pictures])
    cv2.imwrite(str(tmp_path / "picture.png"), pictures[0])
    write_video(tmp_path / "video.mp4", pictures, fps=5.0)
    pipe = TextToVideo.from_pretrained(model)
    for name in ("picture.png", "video.mp4"):
        given = read_clip(tmp_path / name, fps=5.0, num_frames=4, start=0.0, crop=Crop(16, 16))
        assert np.array_equal(given[3], given[0]) is (name == "picture.png")
        make(model, tmp_path / name[0], prompts=("ball",), steps=5, strength=0.4, init_video=tmp_path / name)
        generator = torch.Generator().manual_seed(0)
        expected = pipe("ball", video=given, strength=0.4, num_inference_steps=5, generator=[generator]).frames[0]
        assert np.abs(shown[-1] - 255.0 * expected).max() < 1.0, name
    (record,) = records(tmp_path / "v")
    assert (record["init_video"], record["strength"]) == (str(tmp_path / "video.mp4"), 0.4)
    with pytest.raises(UserError, match="nowhere.mp4 cannot be read"):
        make(model, tmp_path / "none", init_video=tmp_path / "nowhere.mp4")


def test_a_gpu_that_is_too_small_is_told_what_helps(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method, error in (
        ("__call__", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")),
        ("to", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes")),
    ):

        def full(self: TextToVideo, *_: object, error: RuntimeError = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(TextToVideo, method, full)
            with pytest.raises(Failure, match="memory of cpu is too small for this; .*sampling.vae_tile=32"):
                make(model, tmp_path)


def test_eta_is_for_ddim_also_where_the_model_says_the_sampler(model: Path, tmp_path: Path) -> None:
    config = load(TINY, ["sampling.sampler=dpmpp"])
    TextToVideo(config, build_components(config)).save_pretrained(tmp_path / "model")
    for wishes in (
        {"checkpoint": tmp_path / "model", "eta": 0.5},
        {"checkpoint": model, "sampler": "ddpm", "eta": 0.5},
        {"checkpoint": model, "sampler": "ddpm", "overrides": ("sampling.eta=0.5",)},
    ):
        with pytest.raises(UserError, match="eta is not for the sampler dd?p"):
            generate(Request(CLIPS, output_dir=tmp_path / "out", **wishes))  # type: ignore[arg-type]


def test_the_list_of_prompts_must_not_be_empty(tmp_path: Path) -> None:
    for prompts in ((), ("",), ("ball", " ")):
        with pytest.raises(UserError, match="list of prompts is empty or holds an empty one"):
            generate(Request(prompts, output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
