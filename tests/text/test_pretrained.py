"""open_clip weight files of every layout in our tower, against open_clip's own model at the penultimate layer."""

from __future__ import annotations

import urllib.error
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch import Tensor, nn

from vdm.errors import UserError
from vdm.text.encoder import TOKEN_TABLE, TextConfig, TextEncoder, pack_vocabulary, unpack_vocabulary
from vdm.text.pretrained import load_open_clip

CONFIG = TextConfig(text_width=8, text_heads=2, text_layers=4, context_length=10)
PROMPTS = ["push the red cup from left to right", "lift", ""]
VISION = CLIPVisionCfg(layers=1, width=8, head_width=4, patch_size=8, image_size=16)
TEXT = CLIPTextCfg(context_length=10, width=8, heads=2, layers=4)


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    return randomise(open_clip.CLIP(embed_dim=6, vision_cfg=VISION, text_cfg=TEXT))


@pytest.fixture(scope="module")
def custom() -> nn.Module:
    return randomise(open_clip.CustomTextCLIP(embed_dim=6, vision_cfg=VISION, text_cfg=TEXT))


def penultimate(tower: nn.Module) -> Tensor:
    """What open_clip's full tower says after its last layer but one and the final norm."""
    tokens = open_clip.SimpleTokenizer(context_length=10)(PROMPTS)
    with torch.inference_mode():
        x = tower.token_embedding(tokens) + tower.positional_embedding
        for block in tower.transformer.resblocks[:-1]:
            x = block(x, attn_mask=tower.attn_mask)
        return tower.ln_final(x)


def context(encoder: TextEncoder) -> Tensor:
    with torch.inference_mode():
        return encoder.eval()(PROMPTS)


def save(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def with_module_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("wrap", [dict, with_module_prefix])
@pytest.mark.parametrize("kind", ["clip", "custom", "text alone"])
def test_context_is_that_of_open_clip_at_the_penultimate_layer(
    kind: str,
    wrap: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    suffix: str,
    clip: nn.Module,
    custom: nn.Module,
    tmp_path: Path,
) -> None:
    model = clip if kind == "clip" else custom
    tower = clip if kind == "clip" else custom.text
    state = wrap((tower if kind == "text alone" else model).state_dict())
    encoder = TextEncoder(CONFIG)
    before = context(encoder)
    load_open_clip(encoder, str(save(state, tmp_path / f"weights{suffix}")))
    torch.testing.assert_close(context(encoder), penultimate(tower))
    assert not torch.allclose(context(encoder), before, atol=0.1)


def test_a_training_checkpoint_of_open_clip_loads(clip: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": with_module_prefix(clip.state_dict())}, path)
    encoder = TextEncoder(CONFIG)
    load_open_clip(encoder, str(path))
    torch.testing.assert_close(context(encoder), penultimate(clip))
    packed = unpack_vocabulary(pack_vocabulary(encoder.state_dict()))
    assert torch.equal(packed[TOKEN_TABLE], encoder.state_dict()[TOKEN_TABLE]), "no row is lost for not being seen here"


def test_a_model_and_tag_are_downloaded_by_open_clip(
    clip: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(clip.state_dict(), tmp_path / "open_clip.pt")
    asked = []

    def download(config: dict[str, object]) -> str:
        asked.append(config)
        return str(path)

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    encoder = TextEncoder(CONFIG)
    load_open_clip(encoder, "ViT-H-14/laion2b_s32b_b79k")
    assert asked == [open_clip.get_pretrained_cfg("ViT-H-14", "laion2b_s32b_b79k")]
    torch.testing.assert_close(context(encoder), penultimate(clip))


def test_a_failed_download_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(config: dict[str, object]) -> str:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    with pytest.raises(UserError, match="cannot be downloaded .*no route to host.*give a file instead"):
        load_open_clip(TextEncoder(CONFIG), "ViT-H-14/laion2b_s32b_b79k")


@pytest.mark.parametrize("source", ["ViT-H-14", "ViT-H-14/no-such-tag", "no-such-file.pt", "", "a/b/c"])
def test_what_is_neither_a_file_nor_a_model_is_named(source: str) -> None:
    with pytest.raises(
        UserError, match=f"^text.text_weights: {source} is neither a model folder, nor a file, nor an open_clip"
    ):
        load_open_clip(TextEncoder(CONFIG), source)


def test_weights_of_another_activation_are_refused() -> None:
    with pytest.raises(UserError, match="ViT-L-14/openai has quick_gelu, and this tower has gelu"):
        load_open_clip(TextEncoder(CONFIG), "ViT-L-14/openai")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a model folder"):
        load_open_clip(TextEncoder(CONFIG), str(tmp_path))


@pytest.mark.parametrize(
    "changes, shapes",
    [
        ({"text_width": 16}, r"positional_embedding.*\(10, 8\).*\(10, 16\)"),
        ({"text_layers": 6}, r"there is no transformer.resblocks.4.*\(8,\)"),
        ({"context_length": 77}, r"positional_embedding.*\(10, 8\).*\(77, 8\)"),
    ],
)
def test_weights_of_another_shape_are_named(
    changes: dict[str, int], shapes: str, clip: nn.Module, tmp_path: Path
) -> None:
    path = save(clip.state_dict(), tmp_path / "weights.pt")
    encoder = TextEncoder(TextConfig(**{**CONFIG.__dict__, **changes}))
    before = context(encoder)
    with pytest.raises(UserError, match=shapes):
        load_open_clip(encoder, str(path))
    assert torch.equal(context(encoder), before), "a refused file changes nothing"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_file_that_holds_no_weights_is_named(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"weights{suffix} cannot be read as a weight file .*download or copy it again"):
        load_open_clip(TextEncoder(CONFIG), str(path))


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {"state_dict": [1]}, {"state_dict": {"a": 1}}])
def test_a_file_that_holds_something_else_is_named(content: object, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match="weights.pt"):
        load_open_clip(TextEncoder(CONFIG), str(path))
