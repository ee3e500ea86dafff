"""The UNet as a whole: what it copies, and that a compiler sees it as one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import copies
from torch import nn

from vdm.models import UNet3D, UNetConfig

# The original's structure, narrow.
NARROW = UNetConfig(
    unet_dim=16, attention_heads=4, attention_head_dim=4, context_dim=8, norm_num_groups=4, temporal_dropout=0.0
)
TEMPORAL_AT_THE_TOP = 1 + 2 + 3  # transformers over frames: after the first convolution, on the way down, on the way up


def given(frames: int, size: int, *, clips: int = 1) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(clips, 4, frames, size, size, generator=generator)
    return latents, torch.full((clips,), 3), torch.randn(clips, 7, 8, generator=generator)


@pytest.mark.parametrize(("clips", "frames"), [(1, 8), (2, 4)])
def test_nothing_is_reordered_but_for_attention_over_frames(clips: int, frames: int) -> None:
    """Of the size of the activations at full resolution: two attentions a transformer, once in and once out; and the
    packed queries, keys and values of the level below, which are larger. Two upsamplings interleave their phases.

    Smaller tensors do not count: PyTorch computes some convolutions of a few thousand numbers in another order.
    """
    network, arguments = UNet3D(NARROW).eval(), given(frames, 32, clips=clips)
    found = copies(lambda: network(*arguments), numel=clips * 16 * frames * 32 * 32)
    assert len(found) == 4 * TEMPORAL_AT_THE_TOP + 2 * (2 + 3) + 2, found


def test_weights_of_convolutions_lie_as_their_inputs_do() -> None:
    network = UNet3D(NARROW)
    weights = [m.weight[..., 0] if isinstance(m, nn.Conv3d) else m.weight for m in network.modules() if is_conv(m)]
    assert len(weights) > 100 and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Conv3d)


@pytest.mark.slow
def test_it_is_one_graph_for_any_number_of_frames() -> None:
    network = UNet3D(NARROW).eval()
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for frames in (3, 5):
            torch.testing.assert_close(compiled(*given(frames, 8)), network(*given(frames, 8)))
