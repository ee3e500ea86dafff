"""Weights packed for many calls: the same results, nothing kept afterwards, nothing stale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vdm.models import UNet3D, UNetConfig, onednn
from vdm.models.attention import GEGLU
from vdm.models.layers import FrameConv, Linear, TemporalConv, UpsampleConv
from vdm.models.onednn import packed

pytestmark = pytest.mark.skipif(not onednn.ONEDNN, reason="PyTorch came without oneDNN")

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Linear(6, 10),
    "without bias": lambda: Linear(6, 10, bias=False),
    "3x3": lambda: FrameConv(6, 10, 3, padding=1),
    "halving": lambda: FrameConv(6, 10, 3, stride=2, padding=1),
    "1x1": lambda: FrameConv(6, 10, 1),
    "over frames": lambda: TemporalConv(6, 10),
}


def given_to(layer: nn.Module, clips: int, frames: int, side: int) -> Tensor:
    video = torch.randn(clips, frames, side, side + 1, 6).permute(0, 4, 1, 2, 3)
    return video.permute(0, 2, 3, 4, 1) if isinstance(layer, nn.Linear) else video


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(sorted(LAYERS)), clips=st.integers(1, 3), frames=st.integers(1, 5), side=st.integers(1, 6))
def test_packed_layers_compute_the_same_of_every_size(kind: str, clips: int, frames: int, side: int) -> None:
    layer = LAYERS[kind]()
    with torch.no_grad(), packed(layer):
        for size in ((clips, frames, side), (1, 3, 4), (clips, frames, side)):  # packed for the first
            x = given_to(layer, *size)
            found = layer(x)
            assert layer.packs
            expected = layer.double()(x.double())
            layer.float()
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (4, 6)])
def test_of_an_upsampling_convolution_phases_and_taps_are_packed_apart(size: tuple[int, int]) -> None:
    conv, x = UpsampleConv(5), torch.randn(2, 3, 2, 3, 5).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        expected = conv(x, size)
        with packed(conv):
            for other in ((4, 6), (5, 7)):
                conv(x, other)
            torch.testing.assert_close(conv(x, size), expected)


@pytest.mark.parametrize("size", [(2, 2), (1, 4), (1, 1)])
def test_kernels_over_small_pictures_are_one_matrix(size: tuple[int, int]) -> None:
    """Wider than the picture: along rows and columns, with its edges, strided, doubled first."""
    plain, halving, doubling = FrameConv(5, 7, 3, padding=1), FrameConv(5, 7, 3, stride=2, padding=1), UpsampleConv(5)
    x, larger = (torch.randn(2, 3, *sides, 5).permute(0, 4, 1, 2, 3) for sides in (size, (3, 2)))
    calls: dict[nn.Module, Callable[[Tensor], Tensor]] = {
        plain: plain, halving: halving, doubling: lambda x: doubling(x, (2 * x.shape[3], 2 * x.shape[4])),
    }  # fmt: skip
    for layer, call in calls.items():
        with torch.no_grad():
            of_x, of_larger = call(x), call(larger)
            with packed(layer):
                torch.testing.assert_close(call(x), of_x)
                assert [name.rsplit(" of ")[-1] for name in layer.packs or ()] == [str(list(size))]
                torch.testing.assert_close(call(larger), of_larger)


def test_a_packed_gate_is_the_same() -> None:
    network, x = GEGLU(6), torch.randn(2, 5, 6)
    with torch.no_grad():
        expected = network(x, x)
        with packed(network):
            torch.testing.assert_close(network(x, x), expected)
            assert set(network.linear1.packs) == {"gate", "value"}


@pytest.fixture
def unet() -> UNet3D:
    config = UNetConfig(
        unet_dim=8, channel_mult=(1, 2), attention_levels=(True, False), num_res_blocks=1, attention_heads=2,
        attention_head_dim=4, context_dim=6, norm_num_groups=4,
    )  # fmt: skip
    return UNet3D(config).eval()


def output(unet: UNet3D) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 3, 4, 4, generator=draw), torch.randn(1, 2, 6, generator=draw)
    return unet(x, torch.tensor([10]), context)


def kept(unet: UNet3D) -> int:
    return sum(len(layer.packs or ()) for layer in unet.modules() if isinstance(layer, onednn.Packable))


def test_a_whole_unet_keeps_every_weight_it_multiplies_by_until_the_end(unet: UNet3D) -> None:
    with torch.no_grad():
        expected = output(unet)
        with pytest.raises(KeyError), packed(unet):
            torch.testing.assert_close(output(unet), expected)
            layers = [layer for layer in unet.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d)]
            assert kept(unet) >= len(layers)
            raise KeyError
        assert not kept(unet)
        for weight in unet.parameters():
            weight.zero_()
        assert not output(unet).any()


def test_gradients_read_the_weights_themselves(unet: UNet3D) -> None:
    with packed(unet):
        output(unet).sum().backward()
    assert not kept(unet)
    assert all(weight.grad is not None for weight in unet.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_left_to_pytorch(dtype: torch.dtype) -> None:
    layer = FrameConv(3, 4, 3, padding=1).to(dtype)
    with torch.no_grad(), packed(layer):
        layer(torch.randn(1, 3, 2, 4, 4).to(dtype))
        assert layer.packs == {}


def test_a_large_network_is_not_kept_twice(unet: UNet3D, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_of_it = sum(weight.nbytes for weight in unet.parameters())
    for limit, expected in ((bytes_of_it - 1, False), (bytes_of_it, True)):
        monkeypatch.setattr(onednn, "PACKED", limit)
        with torch.no_grad(), packed(unet):
            output(unet)
            assert bool(kept(unet)) == expected
