"""CLIP files of every kind against open_clip's own model, the scores by hand, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import open_clip
import pytest
import tiny_clip as tiny
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from vdm.errors import Failure, UserError
from vdm.metrics import clip as clip_module
from vdm.metrics.clip import Clip, clip_score, clipsim, load_clip, relative_clipsim, selftest
from vdm.metrics.clip_files import is_openai

TEXTS = ["pushing a red cup from left to right", "a dog", ""]


@pytest.fixture(scope="module", autouse=True)
def _models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.known_to_open_clip(tmp_path_factory.mktemp("configs")):
        yield


@pytest.fixture(scope="module")
def quick() -> Any:
    return tiny.make(tiny.QUICK)


@pytest.fixture(scope="module")
def gelu() -> Any:
    return tiny.make(tiny.GELU)


@pytest.fixture(scope="module")
def archive(quick: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_archive(tmp_path_factory.mktemp("openai") / "ViT-B-32.pt", tiny.openai_state(quick))


@pytest.fixture(scope="module")
def clip(archive: Path) -> Clip:
    return load_clip(archive)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 5, 40, 52, 3), dtype=torch.uint8, generator=generator)


def by_open_clip(net: Any, clips: Tensor, pixels: PreprocessCfg | None = None) -> Tensor:
    transform = image_transform_v2(pixels or PreprocessCfg(size=32), is_train=False)
    images = torch.stack([transform(Image.fromarray(frame.numpy())) for frame in clips.flatten(0, 1)])
    with torch.no_grad():
        return F.normalize(net.encode_image(images), dim=-1).unflatten(0, clips.shape[:2])


def texts_by_open_clip(net: Any) -> Tensor:
    with torch.no_grad():
        return F.normalize(net.encode_text(open_clip.tokenize(TEXTS)), dim=-1)


def save(net: Any, path: Path, *, prefix: str = "", dtype: torch.dtype = torch.float32) -> Path:
    state = {prefix + name: tensor.to(dtype).contiguous() for name, tensor in net.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "name": "run", "state_dict": state} if prefix else state, path)
    return path


def require_same(clip: Clip, net: Any, clips: Tensor, *, atol: float = 2e-6) -> None:
    torch.testing.assert_close(clip.frames(clips), by_open_clip(net, clips), rtol=0, atol=atol)
    torch.testing.assert_close(clip.texts(TEXTS), texts_by_open_clip(net), rtol=0, atol=atol)


def require_other(clip: Clip, net: Any, clips: Tensor) -> None:
    assert (clip.frames(clips) - by_open_clip(net, clips)).abs().max() > 1e-3
    assert (clip.texts(TEXTS) - texts_by_open_clip(net)).abs().max() > 1e-3


# Files


def test_openais_archive_is_read_in_full_precision_with_quick_gelu(clip: Clip, quick: Any, clips: Tensor) -> None:
    assert clip.model == tiny.QUICK and clip.net.quick_gelu and len(clip.sha256) == 64
    assert not clip.net.net.training and {p.dtype for p in clip.net.net.parameters()} == {torch.float32}
    require_same(clip, quick, clips)


@pytest.mark.parametrize(("name", "prefix"), [("clip.pt", ""), ("epoch_3.pt", "module."), ("clip.safetensors", "")])
def test_openais_numbers_are_known_in_open_clips_files(
    tmp_path: Path, quick: Any, clips: Tensor, name: str, prefix: str
) -> None:
    """The trap: stored in float32 under open_clip's names, they fit the model with GELU just as well."""
    path = save(quick, tmp_path / name, prefix=prefix)
    clip = load_clip(path)
    assert clip.model == tiny.QUICK
    require_same(clip, quick, clips)
    with pytest.raises(UserError, match=f"need quick-GELU; take {tiny.QUICK}, not {tiny.GELU}"):
        load_clip(path, model=tiny.GELU)


def test_openais_tensors_without_the_archive(tmp_path: Path, quick: Any, clips: Tensor) -> None:
    torch.save(tiny.openai_state(quick), tmp_path / "state.pt")
    require_same(load_clip(tmp_path / "state.pt"), quick, clips)


def test_the_wrong_activation_would_be_seen(tmp_path: Path, quick: Any, gelu: Any, clips: Tensor) -> None:
    path = save(gelu, tmp_path / "laion.safetensors")
    require_same(load_clip(path, model=tiny.GELU), gelu, clips)
    require_other(load_clip(path, model=tiny.QUICK), gelu, clips)


def test_a_file_that_fits_two_models_is_not_guessed_at(tmp_path: Path, gelu: Any) -> None:
    path = save(gelu, tmp_path / "laion.pt")
    with pytest.raises(UserError, match=f"fits {tiny.GELU} and {tiny.QUICK}.* name the model"):
        load_clip(path)


def test_half_precision_all_through_tells_nothing(tmp_path: Path, quick: Any, clips: Tensor) -> None:
    path = save(quick, tmp_path / "half.safetensors", dtype=torch.float16)
    with pytest.raises(UserError, match="fits"):
        load_clip(path)
    require_same(load_clip(path, model=tiny.QUICK), quick, clips, atol=5e-3)


def describe(folder: Path, name: str, **pixels: object) -> None:
    described = {"model_cfg": tiny.CONFIGS[name], "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(described))


def test_the_config_beside_a_published_file_is_followed(tmp_path: Path, gelu: Any, clips: Tensor) -> None:
    path = save(gelu, tmp_path / "open_clip_model.safetensors")
    describe(tmp_path, tiny.GELU)
    require_same(load_clip(path), gelu, clips)
    assert load_clip(path).model == tiny.GELU
    with pytest.raises(UserError, match=f"another CLIP than {tiny.QUICK}"):
        load_clip(path, model=tiny.QUICK)
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
    describe(tmp_path, tiny.GELU, mean=mean, std=std)
    wanted = by_open_clip(gelu, clips, PreprocessCfg(size=32, mean=mean, std=std))
    torch.testing.assert_close(load_clip(path).frames(clips), wanted, rtol=0, atol=2e-6)


def test_a_config_that_contradicts_the_weights_is_refused(tmp_path: Path, quick: Any) -> None:
    path = save(quick, tmp_path / "open_clip_model.safetensors")
    describe(tmp_path, tiny.GELU)
    with pytest.raises(UserError, match="OpenAI's weights, but .* lacks quick_gelu"):
        load_clip(path)
    config = {**tiny.CONFIG, "embed_dim": 25}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(UserError, match="of other sizes"):
        load_clip(path)
    (tmp_path / "open_clip_config.json").write_text("[]")
    with pytest.raises(UserError, match="is not a config of open_clip's"):
        load_clip(path)


def test_openais_numbers_by_content(quick: Any, gelu: Any) -> None:
    assert is_openai(quick.state_dict()) and is_openai(tiny.openai_state(quick))
    assert not is_openai(gelu.state_dict())
    assert not is_openai({name: tensor.half() for name, tensor in quick.state_dict().items()})


def wrong_files(folder: Path, gelu: Any) -> dict[str, tuple[Path, str]]:
    state = gelu.state_dict()
    small = {**state, "token_embedding.weight": torch.zeros(100, 64)}
    odd = {**state, "visual.proj": torch.zeros(64, 25), "text_projection": torch.zeros(64, 25)}
    for name, tensors in {"small": small, "odd": odd, "transformers": {"text_model.x": torch.zeros(1)}}.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    tiny.write_archive(folder / "i3d.pt", {"conv3d_1a_7x7.weight": torch.zeros(2)})
    tiny.write_archive(folder / "traced.pt", dict(state))
    torch.save(torch.zeros(3), folder / "tensor.pt")
    cut = {name: tensor for name, tensor in tiny.openai_state(tiny.make(tiny.QUICK)).items() if name != "ln_final.bias"}
    tiny.write_archive(folder / "cut.pt", cut)
    whole = tiny.write_archive(folder / "whole.pt", {"x": torch.zeros(9)}).read_bytes()
    (folder / "archive.pt").write_bytes(whole.replace(b"constants.pkl", b"constants.xyz"))
    (folder / "text.pt").write_text("no weights")
    return {
        "absent": (folder / "none.pt", "do not exist"),
        "folder": (folder, "do not exist"),
        "transformers": (folder / "transformers.safetensors", "transformers' layout"),
        "vocabulary": (folder / "small.safetensors", "vocabulary of 100 tokens"),
        "unknown size": (folder / "odd.safetensors", "a size that open_clip has no model of"),
        "another archive": (folder / "i3d.pt", "not of OpenAI's CLIP"),
        "traced": (folder / "traced.pt", "not of OpenAI's CLIP"),
        "incomplete archive": (folder / "cut.pt", "lacks a tensor"),
        "damaged archive": (folder / "archive.pt", "cannot be read as a TorchScript archive"),
        "no state": (folder / "tensor.pt", "holds a Tensor"),
        "no weights": (folder / "text.pt", "cannot be read"),
    }


def test_other_files_are_refused_in_a_sentence(tmp_path: Path, gelu: Any) -> None:
    for kind, (path, message) in wrong_files(tmp_path, gelu).items():
        with pytest.raises(UserError, match=message) as caught:
            load_clip(path)
        assert str(path) in str(caught.value), kind


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, gelu: Any) -> None:
    path = save(gelu, tmp_path / "laion.safetensors")
    with pytest.raises(UserError, match=f"other sizes than ViT-B-32; it fits {tiny.GELU}"):
        load_clip(path, model="ViT-B-32")
    with pytest.raises(UserError, match="no model 'tiny-clop'; do you mean tiny-clip"):
        load_clip(path, model="tiny-clop")
    save_file({k: v for k, v in gelu.state_dict().items() if k != "ln_final.bias"}, path)
    with pytest.raises(UserError, match="there is no ln_final.bias"):
        load_clip(path, model=tiny.GELU)


# Features


def test_features_do_not_depend_on_the_batch_and_leave_the_clips_alone(
    clip: Clip, clips: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, whole = clips.clone(), clip.frames(clips)
    assert whole.shape == (3, 5, 24) and whole.dtype == torch.float32
    assert torch.allclose(whole.norm(dim=-1), torch.ones(3, 5))
    torch.testing.assert_close(torch.cat([clip.frames(one[None]) for one in clips]), whole, rtol=0, atol=1e-5)
    texts = clip.texts(TEXTS)
    monkeypatch.setattr(clip_module, "_AT_ONCE", 2)
    torch.testing.assert_close(clip.frames(clips), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(clip.texts(TEXTS), texts, rtol=0, atol=1e-5)
    assert torch.equal(clips, before)


def test_autocast_around_it_changes_nothing(clip: Clip, clips: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = clip.frames(clips)
    assert torch.equal(low, clip.frames(clips)) and not low.requires_grad


def test_fit_and_antialiasing_reach_the_pixels(archive: Path, clip: Clip, clips: Tensor) -> None:
    other = load_clip(archive, fit="squash")
    square = clips[:, :, :, :40]
    assert torch.equal(other.frames(square), clip.frames(square)), "of square clips all three are the same"
    assert (other.frames(clips) - clip.frames(clips)).abs().max() > 0.01
    assert (clip.frames(clips, antialias=False) - clip.frames(clips)).abs().max() > 0.01


def test_a_long_text_is_cut_and_one_text_is_no_list(clip: Clip) -> None:
    long = "cup " * 200
    torch.testing.assert_close(clip.texts([long]), clip.texts([long + "dog"]))
    for bad in ("a dog", []):
        with pytest.raises(ValueError, match="sequence"):
            clip.texts(bad)


def test_damaged_weights_raise(tmp_path: Path, quick: Any, clips: Tensor) -> None:
    state = {name: tensor.clone() for name, tensor in quick.state_dict().items()}
    state["visual.ln_post.bias"][3] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="NaN"):
        load_clip(tmp_path / "nan.safetensors").frames(clips)


# Scores


def test_scores_by_hand() -> None:
    frames = torch.tensor([[[1.0, 0.0], [0.6, 0.8]], [[-1.0, 0.0], [0.0, 1.0]]])
    texts = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    assert clipsim(frames, texts).tolist() == pytest.approx([(1 + 0.6) / 2, (-0.8 + 0.6) / 2])
    assert clip_score(frames, texts).tolist() == pytest.approx([2.5 * 0.8, 2.5 * 0.6 / 2])
    assert clipsim(frames, texts).dtype == torch.float64
    assert relative_clipsim(torch.tensor([0.2, 0.3]), torch.tensor([0.5, 0.3, 0.1])) == pytest.approx(0.25 / 0.3)


def test_the_mean_of_cosines_is_not_the_cosine_of_the_mean() -> None:
    frames = F.normalize(torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    texts = F.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
    by_frame = torch.stack([F.cosine_similarity(frames[:, t], texts) for t in range(16)])
    torch.testing.assert_close(clipsim(frames, texts), by_frame.mean(0).double(), rtol=0, atol=1e-6)
    assert (clipsim(frames, texts) - F.cosine_similarity(frames.mean(1), texts)).abs().max() > 0.05


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        clipsim(torch.zeros(2, 3, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="NaN"):
        clip_score(torch.full((1, 2, 3), torch.nan), torch.ones(1, 3))
    with pytest.raises(ValueError, match="positive"):
        relative_clipsim(torch.tensor([0.2]), torch.tensor([-0.1]))


# The golden values


def test_the_selftest_compares_with_the_golden_values(
    tmp_path: Path, clip: Clip, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    image = tmp_path / "CLIP.png"
    Image.fromarray(pixels).save(image)
    with pytest.raises(UserError, match="golden values are of ViT-B-32-quickgelu"):
        selftest(clip, image=image)
    monkeypatch.setattr(clip_module, "_GOLDEN_MODEL", tiny.QUICK)
    with pytest.raises(UserError, match="cannot be read as an image"):
        selftest(clip, image=tmp_path / "none.png")
    with pytest.raises(Failure, match="where OpenAI has 0.9928, 0.0042, 0.0030"):
        selftest(clip, image=image)
    frame = torch.from_numpy(pixels)[None, None]
    wanted = (100 * clip.frames(frame)[0, 0].double() @ clip.texts(["a diagram", "a dog", "a cat"]).double().T).softmax(
        0
    )
    monkeypatch.setattr(clip_module, "GOLDEN_PROBABILITIES", tuple(wanted.tolist()))
    torch.testing.assert_close(selftest(clip, image=image), wanted)
    cv2.imwrite(str(image), pixels)  # red and blue changed places
    with pytest.raises(Failure):
        selftest(clip, image=image)
