"""`vdm convert` and `TextToVideo.from_pretrained` on every layout: lossless, accounted for, all or nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import CONFIG, stirred

from vdm.checkpoint import save_checkpoint, verify
from vdm.config import to_yaml
from vdm.diffusion import DiffusionConfig
from vdm.errors import UserError
from vdm.interop import Allowed, open_model
from vdm.interop.convert import convert
from vdm.pipeline import TextToVideo
from vdm.weights import open_weights, read_metadata, sha256, write_pickle, write_safetensors

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("unet", "vae", "text")
FOREIGN = ("diffusers", "modelscope")


def silently(source: Path, target: Path, to: str, **options: Any) -> Path:
    convert(source, target, to=to, say=lambda line: None, **options)  # type: ignore[arg-type]
    return target


def said(source: Path, target: Path, to: str, **options: Any) -> list[str]:
    lines: list[str] = []
    convert(source, target, to=to, say=lines.append, **options)  # type: ignore[arg-type]
    return lines


def same_files(left: Path, right: Path) -> None:
    for part in PARTS:
        assert sha256(left / f"{part}.safetensors") == sha256(right / f"{part}.safetensors"), part
    assert (left / "config.yaml").read_text() == (right / "config.yaml").read_text()


def frames(path: Path | None, **options: Any) -> np.ndarray:
    made: np.ndarray = TextToVideo.from_pretrained(path, **options)(
        ["a red ball", "cup"], generator=[torch.Generator().manual_seed(i) for i in (0, 1)]
    ).frames
    return made


# ---- lossless


@pytest.mark.parametrize("layout", FOREIGN)
def test_there_and_back_is_the_same_to_the_bit(
    model: Path, exported: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    back = silently(exported[layout], tmp_path / "back", "vdm")
    verify(back)
    same_files(back, model)


@pytest.mark.parametrize("layout", FOREIGN)
def test_the_shipped_demo_model_too(layout: str, tmp_path: Path) -> None:
    """fp16, a packed vocabulary, and a noise schedule that has no name elsewhere."""
    plain = silently(ROOT / "vdm" / "assets" / "demo", tmp_path / "plain", "vdm")
    over = silently(plain, tmp_path / "over", layout)
    same_files(silently(over, tmp_path / "back", "vdm"), plain)
    assert open_weights(plain / "unet.safetensors")["conv_in.weight"].dtype == torch.float16


def test_through_all_layouts(model: Path, exported: dict[str, Path], tmp_path: Path) -> None:
    there = silently(exported["diffusers"], tmp_path / "1", "modelscope")
    again = silently(there, tmp_path / "2", "diffusers")
    for file in exported["diffusers"].rglob("*.safetensors"):
        assert sha256(file) == sha256(again / file.relative_to(exported["diffusers"])), file.name
    same_files(silently(again, tmp_path / "3", "vdm"), model)


@pytest.mark.parametrize("layout", FOREIGN)
def test_every_layout_makes_the_same_clips(model: Path, exported: dict[str, Path], layout: str) -> None:
    assert np.array_equal(frames(exported[layout]), frames(model))


@pytest.mark.parametrize("layout", FOREIGN)
def test_without_our_notes_the_model_is_still_the_same(
    model: Path, exported: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    """As when another tool has saved the folder; what the layout cannot say is then as in the original."""
    folder = shutil.copytree(exported[layout], tmp_path / "folder")
    (folder / "vdm.yaml").unlink()
    (folder / "vdm.safetensors").unlink()
    if layout == "modelscope":  # 32 groups and its own autoencoder are built into the original
        with pytest.raises(UserError, match="norm_num_groups=32"):
            open_model(folder)
        return
    config = open_model(folder).config
    assert (config.model, config.vae, config.text) == (CONFIG.model, CONFIG.vae, CONFIG.text)
    options = {"num_inference_steps": 20, "guidance_scale": 4.0, "num_frames": 3, "height": 16, "width": 24}
    noise = torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    ours, theirs = (TextToVideo.from_pretrained(path) for path in (model, folder))
    assert np.array_equal(
        ours("ball", latents=noise, **options).frames, theirs("ball", latents=noise, **options).frames
    )  # type: ignore[arg-type]


def test_a_note_that_no_longer_fits_is_passed_over(exported: dict[str, Path], tmp_path: Path) -> None:
    """Someone changed the folder after we wrote it: what it says now holds."""
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    assert open_model(folder).config.diffusion.prediction_type == "v"
    (folder / "vdm.yaml").write_text("model: [not, a, config]")
    assert open_model(folder).config.diffusion.prediction_type == "v"


def test_tokens_count_as_known_where_the_table_is_another(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    assert not open_model(folder).open("text").weights["seen_tokens"].any(), "ours saw nothing"
    file = folder / "text_encoder" / "model.safetensors"
    write_safetensors(file, {name: tensor + 1 for name, tensor in open_weights(file).items()})
    assert open_model(folder).open("text").weights["seen_tokens"].all()


def test_a_training_checkpoint_gives_its_averaged_weights(tmp_path: Path) -> None:
    pipe = stirred()
    weights = {part: dict(module.state_dict()) for part, module in zip(PARTS, (pipe.unet, pipe.vae, pipe.text_encoder),
                                                                      strict=True)}  # fmt: skip
    averaged = {name: tensor + 1.0 for name, tensor in weights["unet"].items()}
    save_checkpoint(tmp_path / "c", config_yaml=to_yaml(CONFIG), weights={**weights, "unet.ema": averaged},
                    trainer_state={"step": 1}, info={})  # fmt: skip
    plain = silently(tmp_path / "c", tmp_path / "plain", "vdm")
    assert sorted(path.name for path in plain.iterdir()) == [
        "config.yaml", "manifest.json", "text.safetensors", "unet.safetensors", "vae.safetensors",
    ]  # fmt: skip
    assert torch.equal(open_weights(plain / "unet.safetensors")["conv_in.bias"], averaged["conv_in.bias"])
    over = silently(tmp_path / "c", tmp_path / "over", "diffusers")
    same_files(silently(over, tmp_path / "back", "vdm"), plain)


# ---- the files of others


def pickled(folder: Path) -> None:
    for file in folder.glob("*/*.safetensors"):
        stem = "pytorch_model" if file.stem == "model" else file.stem
        write_pickle(file.with_name(f"{stem}.bin"), open_weights(file))
        file.unlink()


def as_variant(folder: Path) -> None:
    for file in folder.glob("*/*.safetensors"):
        halves = {name: tensor.half() for name, tensor in open_weights(file).items()}
        write_safetensors(file.with_suffix(".fp16.safetensors"), halves)


def sharded(folder: Path, suffix: str = "") -> None:
    for file in folder.glob("*/*.safetensors"):
        state = dict(open_weights(file))
        places = {name: f"{file.stem}-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(state)}
        for one in set(places.values()):
            write_safetensors(file.with_name(one), {name: state[name] for name in state if places[name] == one})
        index = {"metadata": {}, "weight_map": places}
        file.with_name(f"{file.stem}.safetensors.index{suffix}.json").write_text(json.dumps(index))
        file.unlink()


def with_old_attention(folder: Path) -> None:
    """Autoencoders of before diffusers 0.17, such as Stable Diffusion's and the public model's."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for name, tensor in open_weights(file).items():
        for ours, old in new.items():
            name = name.replace(ours, old)
        state[name] = tensor
    assert sum(".query." in name for name in state) == 4
    write_safetensors(file, state)


def with_position_ids(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    write_safetensors(file, {**open_weights(file), "text_model.embeddings.position_ids": torch.arange(20)[None]})


def without_prefix(folder: Path) -> None:
    """As transformers 5 writes it."""
    file = folder / "text_encoder" / "model.safetensors"
    write_safetensors(file, {name.removeprefix("text_model."): t for name, t in open_weights(file).items()})


@pytest.mark.parametrize(
    "change", [pickled, sharded, with_old_attention, with_position_ids, without_prefix, lambda f: sharded(f, ".fp16")]
)
def test_diffusers_folders_of_every_kind(model: Path, exported: dict[str, Path], change: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    change(folder)
    same_files(silently(folder, tmp_path / "back", "vdm"), model)


def test_a_variant_is_read_when_asked_for_or_alone(model: Path, exported: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    with pytest.raises(
        UserError, match="unet has no diffusion_pytorch_model.fp16.safetensors or .bin, but config.json"
    ):
        silently(folder, tmp_path / "none", "vdm", variant="fp16")
    as_variant(folder)
    same_files(silently(folder, tmp_path / "full", "vdm"), model)
    half = silently(folder, tmp_path / "half", "vdm", variant="fp16")
    assert {t.dtype for t in open_weights(half / "unet.safetensors").specs.values()} == {torch.float16}
    for file in folder.glob("*/*.safetensors"):
        if ".fp16." not in file.name:
            file.unlink()
    same_files(silently(folder, tmp_path / "alone", "vdm"), half)
    assert np.abs(frames(folder) - frames(model)).max() < 0.05
    assert np.array_equal(frames(folder, variant="fp16"), frames(folder))
    with pytest.raises(UserError, match="is no diffusers folder, so it has no variant fp16"):
        open_model(model, variant="fp16")


def test_the_precision_may_be_changed(exported: dict[str, Path], tmp_path: Path) -> None:
    for to, file in (("vdm", "unet.safetensors"), ("modelscope", "text2video_pytorch_model.pth")):
        half = silently(exported["diffusers"], tmp_path / to, to, dtype=torch.bfloat16)
        assert {t.dtype for t in open_weights(half / file).specs.values()} == {torch.bfloat16}


# ---- the report


def test_every_tensor_is_accounted_for(model: Path, exported: dict[str, Path], tmp_path: Path) -> None:
    lines = said(exported["diffusers"], tmp_path / "ms", "modelscope")
    assert lines[0] == f"{exported['diffusers']}: diffusers layout"
    pattern = r"(\w+): (\d+) tensors: (\d+) matched, (\d+) renamed, (\d+) reshaped; 0 missing, 0 unexpected"
    counted = [re.fullmatch(pattern, line) for line in lines]
    found = [(m[1], *map(int, m.groups()[1:])) for m in counted if m]
    assert [row[0] for row in found] == ["unet", "vae", "text"] * 2, "read, then written"
    assert all(total == matched + renamed + reshaped for _, total, matched, renamed, reshaped in found)
    files = dict(
        zip(PARTS, ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"), strict=True)
    )
    for part, total, *_ in found[:3]:
        assert total == len(open_weights(exported["diffusers"] / f"{files[part]}.safetensors"))
    hashes = [line.split(" ", 2) for line in lines if line.startswith(("read ", "wrote "))]
    assert all(sha256(Path(file)) == digest for _, digest, file in hashes)
    assert {Path(file).name for verb, _, file in hashes if verb == "wrote"} == {
        "text2video_pytorch_model.pth", "VQGAN_autoencoder.pth", "open_clip_pytorch_model.bin", "vdm.safetensors",
    }  # fmt: skip


def drop(file: Path, *names: str) -> None:
    write_safetensors(file, {name: t for name, t in open_weights(file).items() if name not in names})


def test_what_is_missing_is_an_error_unless_named(model: Path, exported: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    file, name = folder / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.weight"
    piece = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    drop(file, name, piece)
    with pytest.raises(
        UserError, match=rf"{file} has no conv_in.weight, which should be \(16, 4, 3, 3\); give another"
    ):
        said(folder, tmp_path / "no", "vdm")
    with pytest.raises(
        UserError, match=r"kept in one with \S+to_q.weight, \S+to_k.weight, \S+to_v.weight\); .*to_q.weight'"
    ):
        said(folder, tmp_path / "no", "vdm", allowed=Allowed(missing=(name, piece)))
    assert not (tmp_path / "no").exists()
    lines = said(folder, tmp_path / "yes", "vdm", allowed=Allowed(missing=(name, "mid_block*.attn1.to_?.weight")))
    assert f"  missing: {name}, {piece}" in lines
    others = [piece.replace("to_k", kind) for kind in ("to_q", "to_v")]
    assert f"  left out: {', '.join(others)}" in lines, "what is packed with a missing piece is of no use"
    total = len(open_weights(file))
    assert any(line.startswith(f"unet: {total - 2} tensors: ") and "2 missing" in line for line in lines)
    ours, theirs = open_weights(model / "unet.safetensors"), open_weights(tmp_path / "yes" / "unet.safetensors")
    new = {key for key in ours if not torch.equal(ours[key], theirs[key])}
    assert new == {name, "middle.0.spatial.block.attn1.to_qkv.weight"}
    assert all(theirs[key].isfinite().all() and theirs[key].std() > 0 for key in new)


def test_what_is_unexpected_is_an_error_unless_named(model: Path, exported: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    write_safetensors(file, {**open_weights(file), "loss.logvar": torch.ones(1)})
    with pytest.raises(UserError, match=rf"{file} has loss.logvar \(1,\), which this model has no place for"):
        said(folder, tmp_path / "no", "vdm")
    lines = said(folder, tmp_path / "yes", "vdm", allowed=Allowed(unexpected=("loss.*",)))
    assert "  unexpected: loss.logvar" in lines
    same_files(tmp_path / "yes", model)


# ---- what looks right and is not


def test_a_config_that_is_not_the_weights_is_refused(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "folder")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("num_res_blocks: 1", "num_res_blocks: 2"))
    with pytest.raises(UserError, match="config.yaml is damaged, for its SHA-256 differs"):
        said(folder, tmp_path / "t", "diffusers")
    weights = {part: open_weights(model / f"{part}.safetensors") for part in PARTS}
    other = to_yaml(replace(CONFIG, model=replace(CONFIG.model, num_res_blocks=2)))
    save_checkpoint(tmp_path / "other", config_yaml=other, weights=weights, info={})
    for to in ("vdm", "diffusers", "modelscope"):
        with pytest.raises(UserError, match="unet.safetensors: .* in this config|unet.safetensors: there is no"):
            said(tmp_path / "other", tmp_path / "t", to)
    assert not (tmp_path / "t").exists()


def test_whole_numbers_are_no_weights(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    write_safetensors(file, {name: tensor.int() for name, tensor in open_weights(file).items()})
    with pytest.raises(UserError, match=rf"{file}: \S+ is of torch.int32, not floating-point"):
        said(folder, tmp_path / "t", "vdm")


def test_pieces_of_several_precisions_are_packed_in_the_widest(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = {name: t.half() if name.endswith("to_q.weight") else t for name, t in open_weights(file).items()}
    write_safetensors(file, state)
    packed = open_weights(silently(folder, tmp_path / "t", "vdm") / "unet.safetensors")
    qkv = packed["middle.0.spatial.block.attn1.to_qkv.weight"]
    k = state["mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"]
    assert qkv.dtype == torch.float32 and torch.equal(qkv.chunk(3)[1], k)


def test_numbers_that_a_precision_cannot_hold_are_named(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    write_safetensors(file, {**open_weights(file), "conv_in.bias": torch.full((16,), 1e6)})
    with pytest.raises(UserError, match=r"conv_in.bias reaches 1e\+06, too much for torch.float16; use bf16 or fp32"):
        said(folder, tmp_path / "t", "vdm", dtype=torch.float16)
    assert not (tmp_path / "t").exists()
    silently(folder, tmp_path / "t", "vdm", dtype=torch.bfloat16)


def test_correlated_noise_which_others_do_not_start_from_is_spoken_of(model: Path, tmp_path: Path) -> None:
    weights = {part: open_weights(model / f"{part}.safetensors") for part in PARTS}
    alike = to_yaml(replace(CONFIG, training=replace(CONFIG.training, frame_noise_correlation=0.5)))
    save_checkpoint(tmp_path / "alike", config_yaml=alike, weights=weights, info={})
    for to in ("vdm", *FOREIGN):
        lines = said(tmp_path / "alike", tmp_path / to, to)
        told = [line for line in lines if "training.frame_noise_correlation=0.5" in line]
        assert len(told) == (to != "vdm") and all(line.startswith("note: ") for line in told)


def test_a_note_that_is_not_used_is_spoken_of(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    (folder / "vdm.yaml").write_text("model: [not, a, config]")
    lines = said(folder, tmp_path / "t", "vdm")
    assert any(line.startswith(f"note: {folder / 'vdm.yaml'} does not describe") for line in lines)


@pytest.mark.parametrize("content", [b"", b"junk", {"seen_tokens": torch.ones(3)}, {"other": torch.ones(1)}])
def test_a_useless_record_of_tokens_is_none(exported: dict[str, Path], content: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    record = folder / "vdm.safetensors"
    if isinstance(content, bytes):
        record.write_bytes(content)
    else:
        write_safetensors(record, content, metadata=read_metadata(record))
    assert open_model(folder).open("text").weights["seen_tokens"].all()


def test_the_sampler_and_the_steps_are_those_of_the_folder(exported: dict[str, Path], tmp_path: Path) -> None:
    """Steps by a constant stride, as diffusers and the original take them, whatever our default is."""
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    (folder / "vdm.yaml").unlink()
    assert open_model(folder).config.diffusion.ddim_stride == "constant"
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "DDPMScheduler"}))
    assert open_model(folder).config.sampling.sampler == "ddpm"


# ---- all or nothing


def test_a_refusal_leaves_no_folder_behind(model: Path, tmp_path: Path) -> None:
    stirred(replace(CONFIG, model=replace(CONFIG.model, temporal_layers=3))).save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match="temporal_layers"):
        said(tmp_path / "ours", tmp_path / "a" / "b" / "c", "diffusers")
    assert not (tmp_path / "a").exists()


def test_a_target_inside_the_source_or_behind_a_link_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is inside .*, which is left as it is"):
        said(model, model / "new", "vdm")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link is there already"):
        said(model, tmp_path / "link", "vdm")
    assert not (tmp_path / "nowhere").exists()


def test_an_existing_folder_is_left_alone(model: Path, tmp_path: Path) -> None:
    for to in ("vdm", "diffusers", "modelscope"):
        for target in (model, ROOT / "README.md"):
            with pytest.raises(UserError, match="is there already; choose another folder or remove it"):
                said(model, target, to)
        (tmp_path / to).mkdir()
        silently(model, tmp_path / to, to)  # an empty one is fine
    verify(model)


@pytest.mark.parametrize("to", ["vdm", "diffusers", "modelscope"])
def test_a_damaged_source_leaves_nothing_behind(exported: dict[str, Path], to: str, tmp_path: Path) -> None:
    folder = shutil.copytree(exported["diffusers"], tmp_path / "folder")
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{file} .*truncated: text_model.\S+ and \d+ more tensors are cut off"):
        said(folder, tmp_path / "target", to)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "to", ["vdm", *(pytest.param(to, marks=pytest.mark.slow) for to in ("diffusers", "modelscope"))]
)
def test_a_full_disk_leaves_nothing_behind(model: Path, to: str, tmp_path: Path) -> None:
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from vdm.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "convert", str(model), str(tmp_path / "target"), "--to", to],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_parts_that_are_not_there(tmp_path: Path) -> None:
    pipe = stirred()
    save_checkpoint(tmp_path / "vae", config_yaml=to_yaml(CONFIG), weights={"vae": pipe.vae.state_dict()}, info={})
    with pytest.raises(UserError, match="holds no weights of unet, text; a diffusers folder needs all"):
        said(tmp_path / "vae", tmp_path / "target", "diffusers")
    silently(tmp_path / "vae", tmp_path / "target", "vdm")
    assert verify(tmp_path / "target").parts == ["vae"]


@pytest.mark.parametrize(
    ("change", "to", "sentence"),
    [
        ({"temporal_layers": 3}, "diffusers", "model.temporal_layers is 3, and diffusers' model can only have 4"),
        ({"attention_heads": 2}, "diffusers", "model.attention_heads is 2, and diffusers' model can only have 8"),
        ({"channel_mult": (2, 2, 3)}, "diffusers", r"channel_mult\[0\] is 2"),
        (
            {"model_type": "spatial"},
            "modelscope",
            "model.model_type is spatial, and the original can only have modelscope",
        ),
        ({"temporal_layers": 3}, "modelscope", "model.temporal_layers is 3"),
    ],
)
def test_what_a_layout_cannot_hold_is_named(change: dict[str, Any], to: str, sentence: str, tmp_path: Path) -> None:
    stirred(replace(CONFIG, model=replace(CONFIG.model, **change))).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=sentence):
        said(tmp_path / "model", tmp_path / "target", to)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_schedule_that_the_original_has_not_is_noted(tmp_path: Path) -> None:
    schedule = DiffusionConfig(beta_start=0.0001, beta_end=0.02)
    stirred(replace(CONFIG, diffusion=schedule)).save_pretrained(tmp_path / "model")
    lines = said(tmp_path / "model", tmp_path / "target", "modelscope")
    assert any("another beta_start, beta_end built in, and would sample this model wrongly" in line for line in lines)
    assert open_model(tmp_path / "target").config.diffusion == schedule


# ---- memory

MEASURE = """
import sys, threading, time
from pathlib import Path
from vdm.interop.convert import convert
import vdm.pipeline, open_clip
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10
base = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
convert(Path(sys.argv[1]), Path(sys.argv[2]), to=sys.argv[3], say=lambda line: None)
print(peak - base)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("to", "share"), [("diffusers", 0.35), ("vdm", 0.35), ("modelscope", 1.1)])
def test_the_weights_are_never_in_memory_twice(to: str, share: float, tmp_path: Path) -> None:
    """Of 300 MB only single tensors where safetensors are written, and one part where a pickle is."""
    config = replace(CONFIG, model=replace(CONFIG.model, unet_dim=192, attention_head_dim=16, norm_num_groups=16))
    stirred(config).save_pretrained(tmp_path / "model")
    size = sum(file.stat().st_size for file in (tmp_path / "model").iterdir())
    assert size > 250e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "model"), str(tmp_path / "target"), to],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert int(done.stdout) < share * size, f"{int(done.stdout) / size:.2f} of the weights"
