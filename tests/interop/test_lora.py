"""LoRA files of every naming are merged as W + scale * alpha / r * B A, and as diffusers and PEFT apply them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CONFIG, stirred
from torch import Tensor, nn

from vdm.errors import UserError
from vdm.interop.links import to_theirs
from vdm.interop.names import text_links, unet_links
from vdm.pipeline import TextToVideo
from vdm.weights import Weights, write_pickle, write_safetensors

Command = Callable[..., Any]
SELF = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
TEMPORAL = "up_blocks.0.temp_attentions.1.transformer_blocks.0.attn2"
CROSS = "mid_block.attentions.0.transformer_blocks.0.attn2"
LAYERS = (f"{SELF}.to_q", f"{SELF}.to_v", f"{SELF}.to_out.0", f"{CROSS}.to_k", f"{TEMPORAL}.to_k")
OTHERS = ("conv_in", "down_blocks.0.resnets.0.conv1", "down_blocks.1.temp_convs.0.conv1.2", "time_embedding.linear_1",
          "transformer_in.proj_in", "up_blocks.0.upsamplers.0.conv")  # fmt: skip
TEXT = ("text_model.encoder.layers.1.self_attn.k_proj", "text_model.encoder.layers.0.mlp.fc1")
RANK = 3


def theirs(pipe: TextToVideo) -> dict[str, dict[str, Tensor]]:
    """The weights under diffusers' names."""
    parts: dict[str, tuple[Any, nn.Module]] = {
        "unet": (unet_links(pipe.unet.config, "diffusers"), pipe.unet),
        "text": (text_links(pipe.text_encoder.config, "transformers"), pipe.text_encoder),
    }
    return {
        part: {
            name: tensor.clone() for name, tensor in to_theirs(part, links, Weights.of(module.state_dict()))[0].items()
        }
        for part, (links, module) in parts.items()
    }


def factors(pipe: TextToVideo, layers: tuple[str, ...], part: str = "unet") -> dict[str, tuple[Tensor, Tensor]]:
    """Random A and B for each layer, with the shapes that PEFT gives them."""
    generator = torch.Generator().manual_seed(0)
    weights, made = theirs(pipe)[part], {}
    for layer in layers:
        out, inner, *kernel = weights[f"{layer}.weight"].shape
        made[layer] = (
            torch.randn(RANK, inner, *kernel, generator=generator),
            torch.randn(out, RANK, *[1] * len(kernel), generator=generator),
        )
    return made


def expected(
    pipe: TextToVideo, made: dict[str, tuple[Tensor, Tensor]], strength: float, part: str = "unet"
) -> dict[str, Tensor]:
    weights = theirs(pipe)[part]
    for layer, (down, up) in made.items():
        product = torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double())
        whole = weights[f"{layer}.weight"]
        weights[f"{layer}.weight"] = (whole.double() + strength * product.reshape(whole.shape)).float()
    return weights


def check(pipe: TextToVideo, wanted: dict[str, Tensor], part: str = "unet") -> None:
    for name, tensor in theirs(pipe)[part].items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5, msg=name)


def old_processor(layer: str) -> str:
    """As diffusers named attention before 0.22: "attn1.processor.to_q_lora.down.weight"."""
    return re.sub(r"\.(to_\w+)(\.0)?$", r".processor.\1_lora", layer)


NAMINGS: dict[str, Callable[[str], tuple[str, str]]] = {
    "diffusers": lambda layer: (f"unet.{layer}.lora_A.weight", f"unet.{layer}.lora_B.weight"),
    "peft": lambda layer: (f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"),
    "peft with a named adapter": lambda layer: (f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"),
    "diffusers 0.22": lambda layer: (f"unet.{layer}.lora.down.weight", f"unet.{layer}.lora.up.weight"),
    "attention processors": lambda layer: (f"{old_processor(layer)}.down.weight", f"{old_processor(layer)}.up.weight"),
    "kohya": lambda layer: tuple(f"lora_unet_{layer.replace('.', '_')}.lora_{kind}.weight" for kind in ("down", "up")),  # type: ignore[dict-item,return-value]
}


def save(path: Path, made: dict[str, tuple[Tensor, Tensor]], naming: str, **extra: Tensor) -> Path:
    state = {
        name: tensor for layer, pair in made.items() for name, tensor in zip(NAMINGS[naming](layer), pair, strict=True)
    }
    write_safetensors(path, {**state, **extra})
    return path


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.5])
def test_every_naming_is_merged(naming: str, scale: float, tmp_path: Path) -> None:
    pipe = stirred()
    made = factors(pipe, LAYERS)
    wanted = expected(pipe, made, scale)
    assert pipe.load_lora(save(tmp_path / "lora.safetensors", made, naming), scale=scale) == len(LAYERS)
    check(pipe, wanted)


def test_convolutions_and_all_other_layers(tmp_path: Path) -> None:
    pipe = stirred()
    made = factors(pipe, OTHERS)
    wanted = expected(pipe, made, 1.0)
    assert pipe.load_lora(save(tmp_path / "lora.safetensors", made, "diffusers")) == len(OTHERS)
    check(pipe, wanted)


@pytest.mark.parametrize(
    "naming",
    [
        lambda layer: f"text_encoder.{layer}.lora_{{}}.weight",
        lambda layer: f"text_encoder.{layer.removeprefix('text_model.')}.lora_{{}}.weight",  # of transformers 5
        lambda layer: f"base_model.model.{layer}.lora_{{}}.weight",
        lambda layer: f"base_model.model.{layer.removeprefix('text_model.')}.lora_{{}}.weight",
        lambda layer: f"text_encoder.{layer}.lora_linear_layer.{{}}.weight",
        lambda layer: f"lora_te_{layer.replace('.', '_')}.lora_{{}}.weight",
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_text_tower_too(naming: Callable[[str], str], suffix: str, tmp_path: Path) -> None:
    pipe = stirred()
    made, text = factors(pipe, LAYERS), factors(pipe, TEXT, "text")
    wanted, wanted_text = expected(pipe, made, 0.5), expected(pipe, text, 0.5, "text")
    marks = ("down", "up") if "lora_linear" in naming("x") or naming("x").startswith("lora_te") else ("A", "B")
    state = {naming(layer).format(mark): t for layer, pair in text.items() for mark, t in zip(marks, pair, strict=True)}
    state |= {
        name: t for layer, pair in made.items() for name, t in zip(NAMINGS["diffusers"](layer), pair, strict=True)
    }
    write = write_safetensors if suffix == ".safetensors" else write_pickle
    write(tmp_path / f"pytorch_lora_weights{suffix}", state)
    assert pipe.load_lora(tmp_path, scale=0.5) == len(LAYERS) + len(TEXT)
    check(pipe, wanted)
    check(pipe, wanted_text, "text")


def test_the_text_towers_own_alpha(tmp_path: Path) -> None:
    pipe = stirred()
    text = factors(pipe, TEXT, "text")
    wanted = expected(pipe, text, 2.0, "text")
    state = {f"text_encoder.{layer}.lora_{mark}.weight": t for layer, pair in text.items()
             for mark, t in zip("AB", pair, strict=True)}  # fmt: skip
    noted = {"text_encoder.lora_alpha": 2 * RANK, "unet.lora_alpha": 77}
    write_safetensors(tmp_path / "l.safetensors", state, metadata={"lora_adapter_metadata": json.dumps(noted)})
    pipe.load_lora(tmp_path / "l.safetensors")
    check(pipe, wanted, "text")


@pytest.mark.parametrize(
    ("settings", "strength"),
    [
        ({"r": RANK, "lora_alpha": 6}, 2.0),
        ({"r": RANK, "lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(RANK)),
        ({"r": RANK, "lora_alpha": 1, "alpha_pattern": {"to_(q|k|v)": 9, "to_out.0": 9}}, 3.0),
        ({"r": RANK, "lora_alpha": 3, "alpha_pattern": {"to": 9}}, 1.0),
        ({"r": RANK, "lora_alpha": 3, "alpha_pattern": {"attn\\d.to_(q|k|v|out.0)": 6, "to_q": 99}}, 2.0),
    ],
)
@pytest.mark.parametrize("where", ["adapter_config.json", "the header"])
def test_alpha_as_peft_says_it(settings: dict[str, Any], strength: float, where: str, tmp_path: Path) -> None:
    pipe = stirred()
    made = factors(pipe, LAYERS)
    wanted = expected(pipe, made, strength)
    file = save(tmp_path / "adapter_model.safetensors", made, "peft")
    if where == "the header":
        from vdm.weights import open_weights

        noted = {f"unet.{key}": value for key, value in settings.items()}
        write_safetensors(file, dict(open_weights(file)), metadata={"lora_adapter_metadata": json.dumps(noted)})
    else:
        (tmp_path / where).write_text(json.dumps(settings))
    pipe.load_lora(tmp_path)
    check(pipe, wanted)


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_alpha_as_a_tensor(naming: str, tmp_path: Path) -> None:
    pipe = stirred()
    made = factors(pipe, LAYERS)
    wanted = expected(pipe, made, 0.5)
    alphas = {NAMINGS[naming](layer)[0].rsplit(".lora_", 1)[0] + ".alpha": torch.tensor(1.5) for layer in LAYERS}
    pipe.load_lora(save(tmp_path / "lora.safetensors", made, naming, **alphas))
    check(pipe, wanted)


# ---- the oracle


@pytest.mark.parity
@pytest.mark.parametrize("alpha", [RANK, 8])
def test_the_same_as_in_diffusers(alpha: int, tmp_path: Path) -> None:
    """A LoRA made and saved by PEFT on diffusers' UNet: its output with it is ours after the merge."""
    peft = pytest.importorskip("peft")
    from diffusers import UNet3DConditionModel

    from vdm.interop.convert import convert

    stirred().save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="diffusers", say=lambda line: None)
    plain_unet = UNet3DConditionModel.from_pretrained(tmp_path / "theirs" / "unet")
    names = ["to_q", "to_k", "to_v", "to_out.0", "conv1.2", "conv_in", "time_emb_proj"]
    settings = peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=names, init_lora_weights=False)
    unet = peft.get_peft_model(plain_unet, settings).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    unet.save_pretrained(tmp_path / "lora")
    pipe = TextToVideo.from_pretrained(tmp_path / "ours")
    latents, context = torch.randn(2, 4, 3, 6, 5, generator=generator), torch.randn(2, 7, 16, generator=generator)
    t = torch.tensor([10, 900])
    with torch.no_grad():
        plain = pipe.unet(latents, t, context)
        want = unet(latents, t, context).sample
        count = pipe.load_lora(tmp_path / "lora")
        have = pipe.unet(latents, t, context)
    assert count == sum(name.endswith(".lora_A") for name, _ in unet.named_modules())
    assert (have - want).abs().max() < 1e-5 * want.abs().max()
    assert (plain - want).abs().max() > 0.01 * want.abs().max()


# ---- bad input


def test_a_lora_of_something_else_changes_nothing(tmp_path: Path) -> None:
    pipe = stirred()
    made = factors(pipe, LAYERS)
    before = theirs(pipe)["unet"]
    down, up = made[LAYERS[0]]
    bad: dict[str, tuple[dict[str, Tensor], str]] = {
        "name": (
            {"unet.mid_block.motion_modules.0.to_q.lora_A.weight": down},
            "motion_modules.* is no LoRA of a layer",
        ),
        "plain": ({"conv_in.weight": torch.ones(1)}, "conv_in.weight is no LoRA of a layer"),
        "half": ({f"unet.{LAYERS[0]}.lora_A.weight": down}, "lora_A.weight has no counterpart"),
        "shape": (
            {f"unet.{LAYERS[0]}.lora_A.weight": torch.ones(RANK, 5), f"unet.{LAYERS[0]}.lora_B.weight": up},
            r"lora_A.weight \(3, 5\) and .*lora_B.weight \(32, 3\) do not make a \(32, 32\)",
        ),
        "rank": (
            {f"unet.{LAYERS[0]}.lora_A.weight": down, f"unet.{LAYERS[0]}.lora_B.weight": torch.ones(32, 4)},
            r"do not make a",
        ),
        "empty": ({}, "holds no tensors"),
        "nan": (
            {f"unet.{LAYERS[0]}.lora_A.weight": down * torch.nan, f"unet.{LAYERS[0]}.lora_B.weight": up},
            "make numbers that are not finite",
        ),
        "two": (
            {f"unet.{LAYERS[0]}.lora_A.mine.weight": down, f"unet.{LAYERS[0]}.lora_A.other.weight": down},
            "are of one layer; give a file with one LoRA",
        ),
        "none": (
            {f"unet.{LAYERS[0]}.lora_A.weight": down[:0], f"unet.{LAYERS[0]}.lora_B.weight": up[:, :0]},
            "do not make",
        ),
        "dora": ({f"unet.{LAYERS[0]}.lora_magnitude_vector": down}, "is more than the two factors of a LoRA"),
        "bias": ({f"unet.{LAYERS[0]}.lora_B.bias": down}, "is more than the two factors of a LoRA"),
    }
    good = {name: tensor for layer in LAYERS[1:] for name, tensor in
            zip(NAMINGS["diffusers"](layer), made[layer], strict=True)}  # fmt: skip
    for name, (state, sentence) in bad.items():
        path = tmp_path / f"{name}.safetensors"
        write_safetensors(path, {**good, **state} if state else {})
        with pytest.raises(UserError, match=sentence) as caught:
            pipe.load_lora(path)
        assert str(path) in str(caught.value)
    check(pipe, before)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    pipe = stirred()
    with pytest.raises(UserError, match="LoRA .*nowhere does not exist"):
        pipe.load_lora(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds 0 .safetensors files and none named pytorch_lora_weights.safetensors"):
        pipe.load_lora(tmp_path)
    for name in "ab":
        write_safetensors(tmp_path / f"{name}.safetensors", {})
    with pytest.raises(UserError, match="holds 2 .safetensors files"):
        pipe.load_lora(tmp_path)
    with pytest.raises(UserError, match="scale of a LoRA must be a finite number"):
        pipe.load_lora(tmp_path / "a.safetensors", scale=math.nan)
    file = save(tmp_path / "adapter_model.safetensors", factors(pipe, LAYERS), "peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(UserError, match=f"{file} is a DoRA"):
        pipe.load_lora(tmp_path)
    for settings, sentence in {
        '{"init_lora_weights": "pissa_niter_4"}': "was begun with pissa_niter_4, which changes the model itself",
        '{"lora_alpha": "x"}': "adapter_model.safetensors makes no sense",
        '{"lora_alpha": null}': "adapter_model.safetensors makes no sense",
        '{"lora_alpha": 1, "alpha_pattern": [1]}': "adapter_model.safetensors makes no sense",
    }.items():
        (tmp_path / "adapter_config.json").write_text(settings)
        with pytest.raises(UserError, match=sentence):
            pipe.load_lora(tmp_path)


def test_the_command_merges(command: Command, model: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "lora.safetensors", factors(stirred(), LAYERS), "diffusers")
    arguments = ("--checkpoint", model, "--prompt", "ball", "--steps", "2", "--lora_path", file)
    assert CONFIG.sampling.num_frames == 3
    first = command("sample.py", *arguments, "--output_dir", tmp_path / "one")
    assert first.code == 0 and f"merged a LoRA of {len(LAYERS)} layers from {file}" in first.out
    record = json.loads((tmp_path / "one" / "samples.jsonl").read_text())
    assert (record["lora_path"], record["lora_scale"]) == (str(file), 1.0)
    command("sample.py", *arguments, "--lora-scale", "0", "--output_dir", tmp_path / "none")
    command("sample.py", *arguments[:-2], "--output_dir", tmp_path / "plain")
    clips = {name: (tmp_path / name / "00000-ball.mp4").read_bytes() for name in ("one", "none", "plain")}
    assert clips["none"] == clips["plain"] != clips["one"]
    assert "lora_path" not in json.loads((tmp_path / "plain" / "samples.jsonl").read_text())
    assert "does not exist" in command("sample.py", "--lora_path", tmp_path / "nowhere").error
