"""Layers: what is a view and what is not, which axes a norm reduces over, and each layer against its plain original."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import close, copies, differ, randn, randomise
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vdm.models import onednn
from vdm.models.layers import (
    Downsample,
    FrameConv,
    FrameGroupNorm,
    KeepSize,
    Linear,
    TemporalConv,
    TimeEmbedding,
    Upsample,
    VideoGroupNorm,
    channels_last_weights,
    fold_frames,
    from_image,
    from_tokens,
    sinusoidal_embedding,
    to_image,
    to_tokens,
    unfold_frames,
    zero_init,
)
from vdm.models.operations import _suits_channels

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
LAYOUTS = st.sampled_from([torch.contiguous_format, torch.channels_last_3d])


def video(*shape: int, memory_format: torch.memory_format = torch.channels_last_3d) -> Tensor:
    return randn(*shape).contiguous(memory_format=memory_format)


# Folding


@settings(max_examples=40)
@given(SIZES, LAYOUTS)
def test_folding_and_unfolding_are_inverses_and_keep_the_order(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    x = video(*shape, memory_format=layout)
    B, _, T, H, W = shape
    frames, tokens = fold_frames(x), to_tokens(x)
    assert torch.equal(unfold_frames(frames, T), x)
    assert torch.equal(from_tokens(tokens, (H, W)), x)
    for b, t in [(0, 0), (B - 1, T - 1), (B - 1, 0)]:
        assert torch.equal(frames[b * T + t], x[b, :, t])
        assert torch.equal(tokens[b, t], x[b, :, t].flatten(1).T)


@settings(max_examples=40)
@given(SIZES)
def test_folding_a_channels_last_video_copies_nothing(shape: tuple[int, ...]) -> None:
    x = video(*shape)
    frames, tokens, image = fold_frames(x), to_tokens(x), to_image(x)
    back = [unfold_frames(frames, shape[2]), from_tokens(tokens, x.shape[3:]), from_image(image, x.shape[3:])]
    assert {view.data_ptr() for view in (frames, tokens, image, *back)} == {x.data_ptr()}
    assert tokens.is_contiguous() and all(view.is_contiguous(memory_format=torch.channels_last_3d) for view in back)
    assert all(torch.equal(view, x) for view in back)
    _, C, T, H, W = shape
    # Of a single clip or frame too, whose batch has a stride that does not matter, but to those who look for a layout.
    assert frames.stride(0) == C * H * W and image.stride(0) == C * T * H * W


def test_folding_a_video_in_default_memory_has_to_copy() -> None:
    """So the test above can fail."""
    x = video(2, 3, 4, 5, 6, memory_format=torch.contiguous_format)
    assert fold_frames(x).data_ptr() != x.data_ptr()
    assert not to_tokens(x).is_contiguous()


def test_unfolding_is_a_view_of_frames_in_default_memory_too() -> None:
    frames = randn(6, 3, 4, 5)
    assert unfold_frames(frames, 3).data_ptr() == frames.data_ptr()


# Norms


def test_frame_norm_is_a_group_norm_of_each_frame() -> None:
    x = video(2, 6, 4, 3, 5)
    norm = randomise(FrameGroupNorm(3, 6))
    plain = nn.GroupNorm(3, 6, dtype=torch.float64)
    plain.load_state_dict(norm.state_dict())
    close(norm(x), torch.stack([plain(frame) for frame in x.unbind(2)], dim=2))


def test_video_norm_is_a_group_norm_over_the_frames_too() -> None:
    x = video(2, 6, 4, 3, 5)
    norm = randomise(VideoGroupNorm(3, 6))
    plain = nn.GroupNorm(3, 6, dtype=torch.float64)
    plain.load_state_dict(norm.state_dict())
    close(norm(x), plain(x))
    close(norm(x), F.group_norm(x.contiguous(), 3, norm.weight, norm.bias))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_norm_of_few_channels_a_group_is_the_same(silu: bool, gradients: bool) -> None:
    x = video(2, 48, 12, 16, 15).float() + 3.0  # off zero, where a difference of squares would lose digits
    norm = randomise(FrameGroupNorm(16, 48, silu=silu)).float()
    with torch.set_grad_enabled(gradients):
        assert _suits_channels(fold_frames(x), 16) and not _suits_channels(fold_frames(x), 4)
        found = norm(x)
    torch.testing.assert_close(found, norm.double()(x.double()).float(), atol=2e-5, rtol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("kind", [FrameGroupNorm, VideoGroupNorm])
def test_gradients_of_a_norm_of_few_channels_a_group_are_those_of_pytorch(kind: type[nn.GroupNorm]) -> None:
    x, norm = video(2, 48, 12, 16, 15).float() + 3.0, randomise(kind(16, 48)).float()
    weighing = torch.randn_like(x)
    results = []
    for one in (x, x.double()):
        norm.to(one.dtype)
        wanted = (one.requires_grad_(), norm.weight, norm.bias)
        results.append(torch.autograd.grad((norm(one) * weighing).sum(), wanted))
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).norm()) < 1e-5 * float(expected.norm())


def test_the_two_norms_differ_unless_there_is_one_frame() -> None:
    frame_norm, video_norm = FrameGroupNorm(3, 6).double(), VideoGroupNorm(3, 6).double()
    x = video(2, 6, 4, 3, 5) * torch.arange(1, 5)[:, None, None]
    assert differ(frame_norm(x), video_norm(x))
    close(frame_norm(x[:, :, :1]), video_norm(x[:, :, :1]))


@pytest.mark.parametrize("norm", [FrameGroupNorm(2, 4), VideoGroupNorm(2, 4)])
def test_norms_have_the_eps_of_the_original(norm: nn.GroupNorm) -> None:
    assert norm.eps == 1e-5


# Convolutions


@settings(max_examples=15)
@given(SIZES, LAYOUTS, st.integers(1, 4))
def test_temporal_conv_is_a_conv3d(shape: tuple[int, ...], layout: torch.memory_format, out: int) -> None:
    x = video(*shape, memory_format=layout)
    conv = randomise(TemporalConv(shape[1], out))
    plain = nn.Conv3d(shape[1], out, (3, 1, 1), padding=(1, 0, 0), dtype=torch.float64)
    plain.load_state_dict(conv.state_dict())
    close(conv(x), plain(x))


def test_frame_conv_is_a_conv2d_of_each_frame() -> None:
    x = video(2, 3, 4, 5, 6)
    conv = randomise(FrameConv(3, 7, 3, padding=1))
    plain = nn.Conv2d(3, 7, 3, padding=1, dtype=torch.float64)
    plain.load_state_dict(conv.state_dict())
    close(conv(x), torch.stack([plain(frame) for frame in x.unbind(2)], dim=2))


@pytest.mark.parametrize("layer", [FrameConv(4, 6, 3), FrameGroupNorm(2, 4), VideoGroupNorm(2, 4), TemporalConv(4, 4)])
@pytest.mark.parametrize("clips", [1, 2])
def test_layers_keep_channels_last_without_a_copy(layer: nn.Module, clips: int) -> None:
    x = torch.randn(clips, 4, 3, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    channels_last_weights(layer)
    assert layer(x).is_contiguous(memory_format=torch.channels_last_3d)
    assert copies(lambda: layer(x), numel=x.numel()) == []
    assert copies(lambda: fold_frames(x.contiguous()), numel=x.numel()), "the count of copies sees none at all"


def test_temporal_conv_gradient() -> None:
    conv = TemporalConv(2, 3).double()
    x = randn(1, 2, 3, 1, 2).requires_grad_()
    parameters = tuple(conv.parameters())

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        named = {"weight": weight, "bias": bias}
        return torch.func.functional_call(conv, named, (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_channels_last_weights_change_the_layout_and_not_the_values() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), TemporalConv(4, 4), nn.Linear(4, 4))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    channels_last_weights(module)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(module[0].weight, nn.Parameter)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_zero_init_zeroes_everything_and_returns_the_layer() -> None:
    layer = nn.Linear(3, 4)
    assert zero_init(layer) is layer
    assert all(not parameter.any() for parameter in layer.parameters())
    assert all(parameter.requires_grad for parameter in layer.parameters())


# Resizing


@settings(max_examples=20)
@given(SIZES)
def test_downsample_halves_and_rounds_up(shape: tuple[int, ...]) -> None:
    B, C, T, H, W = shape
    y = Downsample(C).double()(video(*shape), torch.empty(0), torch.empty(0))
    assert y.shape == (B, C, T, math.ceil(H / 2), math.ceil(W / 2))


@settings(max_examples=20)
@given(SIZES, st.integers(0, 1), st.integers(0, 1))
def test_upsample_reaches_the_size_of_its_skip(shape: tuple[int, ...], odd_height: int, odd_width: int) -> None:
    B, C, T, H, W = shape
    size = (2 * H - odd_height, 2 * W - odd_width)
    up = Upsample(C).double()
    assert up(video(*shape), size).shape == (B, C, T, *size)


@settings(max_examples=20)
@given(SIZES, st.booleans())
def test_upsample_is_nearest_neighbour_then_convolution(shape: tuple[int, ...], doubling: bool) -> None:
    B, C, T, H, W = shape
    size = (2 * H, 2 * W) if doubling else (2 * H + 1, 2 * W)
    up, x = randomise(Upsample(C)), video(*shape).requires_grad_()
    frames = F.interpolate(fold_frames(x), size=size, mode="nearest")
    expected = unfold_frames(F.conv2d(frames, up.conv.weight, up.conv.bias, padding=1), T)
    found = up(x, size)
    close(found, expected)
    grad = randn(*found.shape)
    leaves = (x, *up.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, grad) for y in (found, expected)), strict=True):
        close(ours, theirs)


def test_upsample_never_enlarges_what_it_multiplies() -> None:
    x = torch.randn(1, 4, 2, 8, 8)
    up = Upsample(4)
    with FlopCounterMode(display=False) as counter:
        assert up(x, (16, 16)).is_contiguous(memory_format=torch.channels_last_3d)
    assert counter.get_total_flops() == 2 * 2 * (9 * 9) * 16 * 4 * 4  # of 2 * 2 * (16 * 16) * 9 * 4 * 4


def test_keep_size_keeps() -> None:
    x = video(1, 2, 3, 4, 5)
    assert KeepSize()(x, (8, 8)) is x


# Linear


@given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans())
def test_linear_is_pytorchs_whether_or_not_gradients_are_wanted(
    leading: list[int], inside: int, outside: int, bias: bool, transposed: bool
) -> None:
    layer, x = Linear(inside, outside, bias=bias), randn(*leading, inside).float()
    if transposed:
        x = randn(inside, *leading).float().movedim(0, -1)
    expected = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    with torch.no_grad():
        alone = layer(x)
    for found in (alone, layer(x)):
        assert found.shape == expected.shape and found.dtype == torch.float32
        close(found.double(), expected, tolerance=1e-6)
    assert layer(x).requires_grad and not alone.requires_grad


@pytest.mark.skipif(not onednn.ONEDNN, reason="PyTorch came without oneDNN")
@pytest.mark.parametrize(("gradients", "dtype", "expected"), [
    (False, torch.float32, True), (True, torch.float32, True), (False, torch.float64, False),
    (True, torch.bfloat16, False),
])  # fmt: skip
def test_linear_is_onednns_in_float32(gradients: bool, dtype: torch.dtype, expected: bool) -> None:
    layer, x = Linear(3, 4).to(dtype), torch.randn(2, 3).to(dtype)
    with torch.set_grad_enabled(gradients), torch.profiler.profile() as profiler:
        layer(x)
    assert any("_linear_pointwise" in event.name for event in profiler.events()) == expected


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", ["nothing", "input", "weights"])
def test_gradients_of_onednns_linear_are_those_of_pytorch(bias: bool, frozen: str) -> None:
    layer, x = Linear(3, 4, bias=bias), torch.randn(2, 5, 3, requires_grad=frozen != "input")
    layer.requires_grad_(frozen != "weights")
    wanted = [one for one in (x, *layer.parameters()) if one.requires_grad]
    weighing = torch.randn(5, 2, 4).transpose(0, 1)  # a gradient that does not lie in order
    found = torch.autograd.grad((layer(x) * weighing).sum(), wanted)
    expected = torch.autograd.grad((F.linear(x, layer.weight, layer.bias) * weighing).sum(), wanted)
    torch.testing.assert_close(found, expected)


# Time embedding


@settings(max_examples=20)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=4), st.sampled_from([2, 8, 320]))
def test_sinusoidal_embedding_is_the_formula_cosines_first(timesteps: list[int], dim: int) -> None:
    t = torch.tensor(timesteps)
    frequencies = 10_000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = t[:, None].double() * frequencies
    embedding = sinusoidal_embedding(t, dim)
    assert embedding.dtype == torch.float32
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(embedding.double(), expected, rtol=0, atol=2e-4)  # fp32 angles near 1000
    assert torch.equal(sinusoidal_embedding(t.float(), dim), embedding)


def test_time_embedding_is_linear_silu_linear() -> None:
    layer = randomise(TimeEmbedding(8))
    t = torch.tensor([0, 500])
    hidden = F.linear(sinusoidal_embedding(t, 8).double(), layer.linear1.weight, layer.linear1.bias)
    close(layer(t), F.linear(hidden * hidden.sigmoid(), layer.linear2.weight, layer.linear2.bias))
    assert layer(t).shape == (2, 32)


@pytest.mark.parity
def test_sinusoidal_embedding_is_that_of_diffusers() -> None:
    from diffusers.models.embeddings import Timesteps

    t = torch.tensor([0, 1, 17, 500, 999])
    theirs = Timesteps(320, flip_sin_to_cos=True, downscale_freq_shift=0)(t)
    torch.testing.assert_close(sinusoidal_embedding(t, 320), theirs, rtol=0, atol=2e-4)
