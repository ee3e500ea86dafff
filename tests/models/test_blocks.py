"""The UNet's blocks: the axes they mix, what they are at the start, dropout, and memory without copies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import close, copies, differ, randn, randomise
from torch import Tensor, nn

from vdm.models.attention import SpatialTransformer, TemporalTransformer
from vdm.models.blocks import DecoderLayer, Pass, ResBlock, TemporalConvBlock, UNetLayer
from vdm.models.layers import Downsample, KeepSize, Upsample, channels_last_weights

EMPTY = torch.empty(0)
EMB_DIM, CONTEXT_DIM = 5, 6


def res(in_channels: int = 8, out_channels: int = 8, dropout: float = 0.0) -> ResBlock:
    return ResBlock(in_channels, out_channels, EMB_DIM, groups=2, dropout=dropout)


def layer(in_channels: int = 8, channels: int = 8) -> UNetLayer:
    return UNetLayer(
        res(in_channels, channels),
        TemporalConvBlock(channels, layers=2, groups=2, dropout=0.1),
        SpatialTransformer(channels, heads=2, head_dim=4, context_dim=CONTEXT_DIM, groups=2),
        TemporalTransformer(channels, heads=2, head_dim=4, groups=2),
    )


def inputs(channels: int = 8, size: tuple[int, int] = (4, 5)) -> tuple[Tensor, Tensor, Tensor]:
    return randn(2, channels, 3, *size), randn(2, EMB_DIM, seed=1), randn(2, 4, CONTEXT_DIM, seed=2)


def test_pass_does_nothing() -> None:
    x, emb, context = inputs()
    assert Pass()(x, emb, context) is x


@pytest.mark.parametrize("out_channels", [8, 12])
def test_res_block_is_its_formula_frame_by_frame(out_channels: int) -> None:
    block = randomise(res(8, out_channels))
    x, emb, context = inputs()
    parts = block.state_dict()

    def plain(frame: Tensor) -> Tensor:
        h = F.silu(F.group_norm(frame, 2, parts["norm1.weight"], parts["norm1.bias"], eps=1e-5))
        h = F.conv2d(h, parts["conv1.weight"], parts["conv1.bias"], padding=1)
        h = h + F.linear(emb, parts["emb.weight"], parts["emb.bias"])[:, :, None, None]
        h = F.silu(F.group_norm(h, 2, parts["norm2.weight"], parts["norm2.bias"], eps=1e-5))
        h = F.conv2d(h, parts["conv2.weight"], parts["conv2.bias"], padding=1)
        short = F.conv2d(frame, parts["shortcut.weight"], parts["shortcut.bias"]) if out_channels != 8 else frame
        return short + h

    close(block(x, emb, context), torch.stack([plain(frame) for frame in x.unbind(2)], dim=2))


@pytest.mark.parametrize("layers", [1, 4])
def test_temporal_conv_block_is_its_formula(layers: int) -> None:
    block = randomise(TemporalConvBlock(8, layers=layers, groups=2, dropout=0.1))
    x, emb, context = inputs()
    h = x
    for norm, conv in zip(block.norms, block.convs, strict=True):
        h = F.silu(F.group_norm(h, 2, norm.weight, norm.bias, eps=1e-5))  # over frames too
        h = F.conv3d(h, conv.weight, conv.bias, padding=(1, 0, 0))
    close(block(x, emb, context), x + h)


def test_temporal_conv_block_starts_as_the_identity() -> None:
    block = TemporalConvBlock(8, layers=4, groups=2, dropout=0.1)
    x, emb, context = inputs()
    assert torch.equal(block.double()(x, emb, context), x)
    assert not block.convs[-1].weight.any() and all(conv.weight.any() for conv in block.convs[:-1])


def test_temporal_conv_block_drops_in_all_layers_but_the_first() -> None:
    block = TemporalConvBlock(8, layers=4, groups=2, dropout=0.1)
    assert [dropout.p for dropout in block.dropouts] == [0.0, 0.1, 0.1, 0.1]


@pytest.mark.parametrize("block", [res(dropout=0.5), TemporalConvBlock(8, layers=2, groups=2, dropout=0.5)])
def test_dropout_acts_in_training_only(block: nn.Module) -> None:
    block = randomise(block)
    arguments = inputs()
    assert torch.equal(block(*arguments), block(*arguments))
    block.train()
    assert differ(block(*arguments), block(*arguments))


def test_a_layer_goes_space_time_space_time() -> None:
    unit = randomise(layer())
    x, emb, context = inputs()
    expected = x
    for block in (unit.res, unit.temporal_conv, unit.spatial, unit.temporal):
        expected = block(expected, emb, context)
    close(unit(x, emb, context), expected)


@pytest.mark.parametrize("up, size", [(Upsample(8), (4, 5)), (KeepSize(), (2, 3))])
def test_decoder_layer_comes_up_to_its_skip_and_appends_it(up: Upsample | KeepSize, size: tuple[int, int]) -> None:
    block = randomise(DecoderLayer(up, layer(12, 8)))
    x, emb, context = inputs(size=(2, 3))
    skip = randn(2, 4, 3, *size, seed=5)
    expected = block.layer(torch.cat([block.upsample(x, size), skip], dim=1), emb, context)
    close(block(x, skip, emb, context), expected)
    assert expected.shape == (2, 8, 3, *size)


@pytest.mark.parametrize("block", [res(8, 12), TemporalConvBlock(8, layers=2, groups=2, dropout=0.1), layer()])
def test_gradients_reach_every_parameter(block: nn.Module) -> None:
    block = randomise(block)
    x, emb, context = inputs()
    (block(x, emb, context) * randn(1, 1, 3, 4, 5, seed=3)).sum().backward()
    silent = [name for name, p in block.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]
    assert not silent


# Memory: float32, larger, the layout that the UNet chooses at its door


def memory_inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 16, 3, 12, 12).contiguous(memory_format=torch.channels_last_3d)
    return x, torch.randn(2, EMB_DIM), torch.randn(2, 4, CONTEXT_DIM)


def big_spatial() -> SpatialTransformer:
    return SpatialTransformer(16, heads=4, head_dim=4, context_dim=CONTEXT_DIM, groups=4)


SPATIAL_BLOCKS: list[nn.Module] = [
    ResBlock(16, 16, EMB_DIM, groups=4, dropout=0.0),
    ResBlock(16, 32, EMB_DIM, groups=4, dropout=0.0),
    UNetLayer(ResBlock(16, 16, EMB_DIM, groups=4, dropout=0.0), Pass(), big_spatial(), Pass()),
    TemporalConvBlock(16, layers=4, groups=4, dropout=0.1),
    Downsample(16),
]


@pytest.mark.parametrize("block", SPATIAL_BLOCKS)
def test_blocks_copy_no_activation(block: nn.Module) -> None:
    """All but temporal attention. The fused attention kernel throughout, as on a GPU: see test_attention.py."""
    channels_last_weights(block.eval())
    arguments = memory_inputs()
    assert block(*arguments).is_contiguous(memory_format=torch.channels_last_3d)
    assert copies(lambda: block(*arguments), numel=arguments[0].numel()) == []


@pytest.mark.parametrize("block", SPATIAL_BLOCKS[:3])
def test_in_default_memory_the_same_blocks_do_copy(block: nn.Module) -> None:
    """So the test above can fail."""
    x, emb, context = memory_inputs()
    block.eval()
    assert copies(lambda: block(x.contiguous(), emb, context), numel=x.numel())


def test_a_whole_layer_copies_for_temporal_attention_only() -> None:
    temporal_conv = TemporalConvBlock(16, layers=2, groups=4, dropout=0.1)
    temporal = TemporalTransformer(16, heads=4, head_dim=4, groups=4)
    block = UNetLayer(ResBlock(16, 16, EMB_DIM, 4, 0.0), temporal_conv, big_spatial(), temporal).eval()
    arguments = memory_inputs()
    channels_last_weights(block)
    assert len(copies(lambda: block(*arguments), numel=arguments[0].numel())) <= 4  # two attentions, in and out


def test_upsample_and_append_keep_channels_last() -> None:
    x, emb, context = memory_inputs()
    block = DecoderLayer(Upsample(16), UNetLayer(ResBlock(24, 16, EMB_DIM, 4, 0.0), Pass(), Pass(), Pass())).eval()
    channels_last_weights(block)
    skip = torch.randn(2, 8, 3, 23, 24).contiguous(memory_format=torch.channels_last_3d)
    assert block(x, skip, emb, context).is_contiguous(memory_format=torch.channels_last_3d)
    joined = 2 * 24 * 3 * 23 * 24  # torch.cat writes one new tensor; nothing of its size is copied besides
    assert copies(lambda: block(x, skip, emb, context), numel=joined) == []
