"""Every tensor has one place in every layout, and the names are the other layouts' own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdm.config import load
from vdm.interop.links import Link, their_shape, to_ours, to_theirs
from vdm.interop.names import text_links, text_tensors, unet_links, unet_tensors, vae_links, vae_tensors
from vdm.models import UNetConfig, VAEConfig
from vdm.text.encoder import TextConfig
from vdm.weights import Weights

A100 = load(Path(__file__).parents[2] / "configs" / "a100.yaml")
# SHA-256 of "name shape\n" of all tensors, sorted, of the original code's own classes built with the public
# configuration.json: UNetSD and AutoencoderKL of modelscope at commit 2905da12.
ORIGINAL_UNET = "7ca6c56f8175b1bf866cf1a784fbd1164a2f8240f569892aa3c9eb570c288438"
ORIGINAL_VAE = "a0c24ae5e2efcfb40b2c83e1ff7ce960f45180d423ae15330a5622360a52514e"


def shapes(links: Sequence[Link], ours: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: their_shape(link, ours[link.ours]) for link in links for name in link.theirs}


def fingerprint(tensors: dict[str, tuple[int, ...]]) -> str:
    lines = "".join(f"{name} {list(shape)}\n" for name, shape in sorted(tensors.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def test_the_full_size_model_has_the_originals_names_and_shapes() -> None:
    unet = shapes(unet_links(A100.model, "modelscope"), unet_tensors(A100.model))
    assert len(unet) == 1_480 and "input_blocks.1.0.temopral_conv.conv4.3.weight" in unet
    assert fingerprint(unet) == ORIGINAL_UNET
    vae = shapes(vae_links(A100.vae, "ldm"), vae_tensors(A100.vae))
    assert len(vae) == 248 and fingerprint(vae) == ORIGINAL_VAE


@pytest.mark.parity
def test_the_full_size_model_has_diffusers_names_and_shapes() -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNet3DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    levels = len(A100.vae.vae_channels)
    big = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    with torch.device("meta"):
        unet = UNet3DConditionModel()  # its defaults are the original's
        image = UNet2DConditionModel(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
                                     use_linear_projection=True)  # fmt: skip
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=A100.vae.vae_channels, layers_per_block=2,
        )  # fmt: skip
        text = CLIPTextModel(CLIPTextConfig(**big))

    def of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        return {name.removeprefix("text_model."): tuple(t.shape) for name, t in module.state_dict().items()}

    tensors = unet_tensors(A100.model)
    spatial = {link.ours for link in unet_links(A100.model, "ldm")}
    links = unet_links(A100.model, "diffusers")
    assert shapes(links, tensors) == of(unet)
    assert shapes([link for link in links if link.ours in spatial], tensors) == of(image)
    assert shapes(vae_links(A100.vae, "diffusers"), vae_tensors(A100.vae)) == of(vae)
    found = shapes(text_links(A100.text, "transformers"), text_tensors(A100.text))
    assert {name.removeprefix("text_model."): shape for name, shape in found.items()} == of(text)


@pytest.mark.parity
def test_the_single_file_has_the_names_that_diffusers_reads() -> None:
    """diffusers' own loader of Stable Diffusion files takes every tensor of ours to where our diffusers names are."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    config = UNetConfig(unet_dim=64, context_dim=128)
    tensors, links = unet_tensors(config), unet_links(config, "ldm")
    marks = {name: torch.full(shape, 1.0) for name, shape in shapes(links, tensors).items()}
    theirs = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
    converted = convert_ldm_unet_checkpoint({f"model.diffusion_model.{k}": v for k, v in marks.items()}, theirs)
    spatial = {link.ours for link in links}
    expected = shapes([link for link in unet_links(config, "diffusers") if link.ours in spatial], tensors)
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == expected
    vae = VAEConfig()
    marks = {f"first_stage_model.{name}": torch.ones(shape) for name, shape in shapes(
        vae_links(vae, "ldm"), vae_tensors(vae)).items()}  # fmt: skip
    converted = convert_ldm_vae_checkpoint(marks, {"down_block_types": [0] * 4, "up_block_types": [0] * 4})
    assert set(converted) == set(shapes(vae_links(vae, "diffusers"), vae_tensors(vae)))


@st.composite
def unet_configs(draw: st.DrawFn) -> UNetConfig:
    levels = draw(st.integers(1, 4))
    return UNetConfig(
        unet_dim=8,
        channel_mult=tuple(draw(st.lists(st.integers(1, 3), min_size=levels, max_size=levels))),
        attention_levels=tuple(draw(st.lists(st.booleans(), min_size=levels, max_size=levels))),
        num_res_blocks=draw(st.integers(1, 3)),
        attention_heads=draw(st.sampled_from([1, 8])),
        attention_head_dim=4,
        context_dim=draw(st.integers(1, 6)),
        norm_num_groups=2,
    )


def check_both_ways(links: Sequence[Link], tensors: dict[str, Tensor]) -> None:
    """A state of random numbers goes over and comes back equal; no name is used twice."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    theirs, report = to_theirs("part", links, Weights.of(state))
    names = [name for link in links for name in link.theirs]
    assert len(names) == len(set(names)) == report.total == len(theirs)
    back, _ = to_ours("part", links, Weights.of(dict(theirs)), tensors, source="theirs")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@settings(max_examples=8)
@given(unet_configs())
def test_every_unet_goes_over_and_comes_back(config: UNetConfig) -> None:
    for layout in ("diffusers", "modelscope"):
        check_both_ways(unet_links(config, layout), unet_tensors(config))  # type: ignore[arg-type]


@settings(max_examples=15)
@given(st.lists(st.sampled_from([2, 4, 6]), min_size=1, max_size=4), st.integers(1, 3))
def test_every_autoencoder_goes_over_and_comes_back(widths: list[int], layers: int) -> None:
    config = VAEConfig(vae_channels=tuple(widths), layers_per_block=layers, vae_norm_num_groups=2)
    for layout in ("diffusers", "ldm"):
        check_both_ways(vae_links(config, layout), vae_tensors(config))  # type: ignore[arg-type]


def test_every_text_tower_goes_over_and_comes_back() -> None:
    config = TextConfig(text_width=4, text_heads=2, text_layers=4, context_length=5)
    tower = {name: tensor for name, tensor in text_tensors(config).items() if name.startswith("tower.")}
    for layout in ("transformers", "open_clip"):
        check_both_ways(text_links(config, layout), tower)  # type: ignore[arg-type]


def test_layers_without_a_place_are_told_apart() -> None:
    """An image model has no temporal layers, and the other layouts' autoencoders have none in time."""
    config = UNetConfig(unet_dim=8, attention_head_dim=4, context_dim=6, norm_num_groups=2)
    linked = {link.ours for link in unet_links(config, "ldm")}
    temporal = set(unet_tensors(config)) - linked
    assert temporal and all(".temporal" in name or name.startswith("transformer_in.") for name in temporal)
    vae = VAEConfig(temporal_decoder=True)
    unlinked = set(vae_tensors(vae)) - {link.ours for link in vae_links(vae, "diffusers")}
    assert unlinked and all(name.startswith("decoder.time.") for name in unlinked)
