"""UNet3D: the original's size and numbers, shapes of any kind, and what may influence what."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import UNET, close, differ, randn, randomise
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import oracles
from vdm.config import load
from vdm.errors import UserError
from vdm.interop.names import unet_links
from vdm.models import UNet3D, UNetConfig

A100 = Path(__file__).resolve().parents[2] / "configs" / "a100.yaml"
SPATIAL = replace(UNET, model_type="spatial")
TEMPORAL = ("temporal", "transformer_in")  # what the names of the layers begin with that mix frames
PACKED = {"to_qkv.weight": 3, "to_kv.weight": 2}


def inputs(
    B: int = 2, T: int = 3, h: int = 4, w: int = 5, *, k: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    timesteps = torch.arange(B) * 37 + 5
    return randn(B, UNET.in_channels, T, h, w, seed=seed), timesteps, randn(k * B, 7, UNET.context_dim, seed=seed + 1)


def is_temporal(name: str) -> bool:
    return any(part.startswith(TEMPORAL) for part in name.split("."))


# The original's structure


def unpacked_shapes(network: nn.Module) -> Counter[tuple[int, ...]]:
    """Shapes of the weights as the original counts them, where queries, keys and values have a matrix each."""
    shapes: Counter[tuple[int, ...]] = Counter()
    for name, tensor in network.state_dict().items():
        pieces = next((pieces for ending, pieces in PACKED.items() if name.endswith(ending)), 1)
        shapes[(tensor.shape[0] // pieces, *tensor.shape[1:])] += pieces
    return shapes


@pytest.mark.parametrize("config", [UNetConfig(), load(A100).model], ids=["default", "a100.yaml"])
def test_the_original_has_1411233860_parameters_in_1480_tensors(config: UNetConfig) -> None:
    with torch.device("meta"):
        network = UNet3D(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_411_233_860
    assert unpacked_shapes(network).total() == 1_480


DEEP = UNetConfig(
    unet_dim=8,
    channel_mult=(1, 2, 3),
    attention_levels=(True, True, False),
    attention_head_dim=4,
    context_dim=6,
    norm_num_groups=2,
)


@pytest.mark.parity
@pytest.mark.parametrize("T, h, w", [(1, 8, 8), (2, 4, 12), (3, 5, 7), (4, 9, 6), (5, 8, 11)])
@pytest.mark.parametrize("config", [DEEP, replace(UNET, attention_heads=8, temporal_layers=4)], ids=["deep", "shallow"])
def test_output_is_that_of_diffusers(config: UNetConfig, T: int, h: int, w: int) -> None:
    theirs = randomise(oracles.their_unet(config))
    ours = UNet3D(config).double().eval()
    oracles.take(ours, unet_links(config, "diffusers"), theirs.state_dict())
    latents, timesteps, context = inputs(2, T, h, w)
    with torch.inference_mode():
        out, expected = ours(latents, timesteps, context), theirs(latents, timesteps, context).sample
    close(out, expected, tolerance=1e-5)
    # Only the sinusoids are fp32, and round otherwise; at time step 0 they are exact.
    with torch.inference_mode():
        close(ours(latents, 0 * timesteps, context), theirs(latents, 0 * timesteps, context).sample, tolerance=1e-10)


# Shapes


@st.composite
def configs(draw: st.DrawFn) -> UNetConfig:
    levels = draw(st.integers(1, 3))
    return UNetConfig(
        model_type=draw(st.sampled_from(["modelscope", "spatial"])),
        in_channels=draw(st.integers(1, 5)),
        unet_dim=draw(st.sampled_from([4, 8])),
        channel_mult=tuple(draw(st.lists(st.integers(1, 3), min_size=levels, max_size=levels))),
        attention_levels=tuple(draw(st.lists(st.booleans(), min_size=levels, max_size=levels))),
        num_res_blocks=draw(st.integers(1, 2)),
        attention_heads=draw(st.integers(1, 3)),
        attention_head_dim=draw(st.sampled_from([2, 4])),
        temporal_layers=draw(st.integers(1, 4)),
        context_dim=draw(st.integers(1, 6)),
        norm_num_groups=draw(st.sampled_from([1, 2, 4])),
    )


@settings(max_examples=15)
@given(configs(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_any_size_goes_in_and_comes_out(config: UNetConfig, B: int, T: int, h: int, w: int, k: int) -> None:
    network = UNet3D(config).eval()
    latents, context = torch.randn(B, config.in_channels, T, h, w), torch.randn(k * B, 5, config.context_dim)
    with torch.inference_mode():
        out = network(latents, torch.randint(1000, (B,)), context)
    assert out.shape == (k * B, config.in_channels, T, h, w)
    assert out.isfinite().all()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("latents_dtype", [torch.float32, torch.float16])
def test_output_has_the_dtype_of_the_latents(weights: torch.dtype, latents_dtype: torch.dtype) -> None:
    latents, timesteps, context = inputs()
    out = UNet3D(UNET).to(weights)(latents.to(latents_dtype), timesteps, context.to(torch.bfloat16))
    assert out.dtype == latents_dtype


def test_memory_layout_and_integer_time_steps_change_nothing() -> None:
    network, (latents, timesteps, context) = tiny.unet(), inputs()
    out = network(latents, timesteps, context)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    strided = latents.transpose(3, 4).contiguous().transpose(3, 4)
    close(network(strided, timesteps.double(), context), out)


def test_every_layer_keeps_channels_last() -> None:
    network = UNet3D(DEEP).eval()
    broken: list[str] = []

    def check(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if (
                isinstance(out, Tensor)
                and out.dim() == 5
                and not out.is_contiguous(memory_format=torch.channels_last_3d)
            ):
                broken.append(name)

        module.register_forward_hook(hook)

    for name, module in network.named_modules():
        check(name, module)
    with torch.inference_mode():
        network(*(x.float() for x in inputs(2, 3, 9, 6)))
    assert not broken


X, T_, C = inputs()
BAD_INPUTS = {
    "latents must be": [(X[0], T_, C), (X[:, :3], T_, C), (X[:, :, :0], T_, C), (X[..., :0], T_, C)],
    "timesteps must be": [(X, T_[:1], C), (X, T_[0], C), (X, T_[None], C)],
    "context must be": [(X, T_, C[0]), (X, T_, C[..., :5]), (X, T_, C[:1]), (X, T_, C[:0]), (X, T_, C[:, :0])],
}


@pytest.mark.parametrize("start, arguments", [(start, bad) for start, cases in BAD_INPUTS.items() for bad in cases])
def test_wrong_shapes_are_named(start: str, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(UserError, match=f"^{start}.*got"):
        tiny.unet()(*arguments)


def test_more_frames_than_max_num_frames_are_refused() -> None:
    network = tiny.unet(replace(UNET, max_num_frames=3))
    assert network(*inputs(T=3)).shape[2] == 3
    with pytest.raises(UserError, match="4 frames exceed model.max_num_frames=3"):
        network(*inputs(T=4))


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    *[({key: 0}, f"model.{key}") for key in ("in_channels", "unet_dim", "num_res_blocks", "attention_heads")],
    *[
        ({key: 0}, f"model.{key}")
        for key in ("attention_head_dim", "temporal_layers", "context_dim", "norm_num_groups")
    ],
    ({"channel_mult": (1, 2, 4)}, "one entry per level"),
    ({"channel_mult": (), "attention_levels": ()}, "one entry per level"),
    ({"channel_mult": (1, 0, 4, 4)}, "model.channel_mult"),
    ({"unet_dim": 33, "norm_num_groups": 1, "attention_head_dim": 1}, "must be even"),
    ({"norm_num_groups": 7}, "model.norm_num_groups=7"),
    ({"attention_head_dim": 48}, "model.attention_head_dim=48"),
    ({"dropout": 1.0}, "model.dropout"),
    ({"temporal_dropout": -0.1}, "model.temporal_dropout"),
    ({"max_num_frames": 0}, "model.max_num_frames"),
]


@pytest.mark.parametrize("changes, message", BAD_FIELDS)
def test_impossible_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        replace(UNetConfig(), **changes)


# What may influence what


@settings(max_examples=5)
@given(st.integers(2, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_a_clip_does_not_depend_on_its_neighbours(B: int, T: int, h: int, w: int) -> None:
    network, (latents, timesteps, context) = tiny.unet(), inputs(B, T, h, w)
    with torch.inference_mode():
        out = network(latents, timesteps, context)
        alone = [network(latents[i : i + 1], timesteps[i : i + 1], context[i : i + 1]) for i in range(B)]
        close(out, torch.cat(alone))
        latents[1:], context[1:], timesteps[1:] = float("nan"), float("nan"), 0
        close(network(latents, timesteps, context)[:1], alone[0])


@settings(max_examples=5)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
def test_k_contexts_are_k_calls(k: int, B: int, T: int) -> None:
    network, (latents, timesteps, context) = tiny.unet(), inputs(B, T, k=k)
    with torch.inference_mode():
        calls = [network(latents, timesteps, one) for one in context.chunk(k)]
        close(network(latents, timesteps, context), torch.cat(calls))
    assert all(differ(calls[0], other) for other in calls[1:])


@pytest.mark.parametrize("index", range(3))
def test_every_input_matters(index: int) -> None:
    arguments, other = list(inputs()), list(inputs())
    other[index] = other[index].flip(0) + 1
    network = tiny.unet()
    assert differ(network(*arguments), network(*other))


@settings(max_examples=5)
@given(st.permutations(range(4)))
def test_the_image_model_takes_frames_in_any_order(order: list[int]) -> None:
    network, (latents, timesteps, context) = tiny.unet(SPATIAL), inputs(T=4)
    with torch.inference_mode():
        out = network(latents, timesteps, context)
        close(network(latents[:, :, order], timesteps, context), out[:, :, order])


@pytest.mark.parametrize("kind", ["temporal_conv", "temporal", "transformer_in"])
def test_each_kind_of_temporal_layer_makes_frames_matter_to_each_other(kind: str) -> None:
    """All weights as at the start, where time does nothing, but those of one kind."""
    network, random = UNet3D(UNET).double().eval(), tiny.unet().state_dict()
    chosen = {name: tensor for name, tensor in random.items() if kind in name.split(".")}
    latents, timesteps, context = inputs(T=4)
    flipped = latents.clone()
    flipped[:, :, 1:] = flipped[:, :, 1:].flip(0, 3)  # the first frame stays

    def first_frame(latents: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(latents, timesteps, context)[:, :, 0]

    close(first_frame(flipped), first_frame(latents))
    network.load_state_dict(chosen, strict=False)
    assert differ(first_frame(flipped), first_frame(latents))


def test_the_video_model_knows_the_order_of_frames_by_its_convolutions() -> None:
    network, (latents, timesteps, context) = tiny.unet(), inputs(T=4)
    order = [2, 0, 3, 1]
    with torch.inference_mode():
        out = network(latents, timesteps, context)
        assert differ(network(latents[:, :, order], timesteps, context), out[:, :, order])


def test_an_untrained_video_model_is_its_image_model_frame_by_frame() -> None:
    torch.manual_seed(0)
    video, image = UNet3D(UNET).double().eval(), UNet3D(SPATIAL).double().eval()
    shared = {name: tensor for name, tensor in video.state_dict().items() if not is_temporal(name)}
    image.load_state_dict(shared)  # strict: the image model is exactly the video model without its temporal layers
    latents, timesteps, context = inputs(T=3)
    with torch.inference_mode():
        out = video(latents, timesteps, context)
        frames = [image(frame.unsqueeze(2), timesteps, context) for frame in latents.unbind(2)]
    close(out, torch.cat(frames, dim=2))


@pytest.mark.parametrize("config", [UNET, SPATIAL])
def test_gradients_reach_every_parameter_and_the_inputs(config: UNetConfig) -> None:
    network, (latents, timesteps, context) = tiny.unet(config), inputs()
    latents.requires_grad_()
    context.requires_grad_()
    (network(latents, timesteps, context) * randn(2, UNET.in_channels, 3, 4, 5, seed=9)).sum().backward()
    tensors = {**dict(network.named_parameters()), "latents": latents, "context": context}
    assert not [name for name, tensor in tensors.items() if tensor.grad is None or tensor.grad.abs().max() < 1e-9]
