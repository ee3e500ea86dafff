"""Activation checkpointing: less memory, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vdm.models import UNet3D, UNetConfig
from vdm.models.blocks import ResBlock
from vdm.training.parallel import checkpoint_activations

CONFIG = UNetConfig(
    unet_dim=16,
    channel_mult=(1, 2),
    attention_levels=(True, False),
    num_res_blocks=1,
    attention_heads=1,
    attention_head_dim=16,
    temporal_layers=2,
    context_dim=8,
    norm_num_groups=4,
    dropout=0.2,
    temporal_dropout=0.2,
)


def network(*, checkpointed: bool) -> UNet3D:
    torch.manual_seed(0)
    unet = UNet3D(CONFIG)
    with torch.no_grad():
        for parameter in unet.parameters():  # zero-initialised layers would hide the dropout before them
            parameter += 0.1 * torch.randn(parameter.shape)
    if checkpointed:
        checkpoint_activations(unet)
    return unet


def gradients(unet: UNet3D, *, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 4, 3, 4, 4, generator=generator), torch.randn(2, 5, 8, generator=generator)
    torch.manual_seed(7)  # of the dropout
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        output = unet(latents, torch.tensor([3, 900]), context)
    output.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_with_dropout(dtype: torch.dtype) -> None:
    plain, recomputed = (gradients(network(checkpointed=flag).train(), dtype=dtype) for flag in (False, True))
    assert plain.keys() == recomputed.keys() == dict(network(checkpointed=False).named_parameters()).keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
    other = gradients(network(checkpointed=False).eval(), dtype=dtype)
    assert any(not torch.equal(gradient, other[name]) for name, gradient in plain.items()), "there was dropout"


@pytest.mark.parametrize(("checkpointed", "training", "times"), [(False, True, 1), (True, True, 2), (True, False, 1)])
def test_layers_run_twice_only_where_they_are_recomputed(
    monkeypatch: pytest.MonkeyPatch, checkpointed: bool, training: bool, times: int
) -> None:
    calls = 0
    original = ResBlock.forward

    def counted(self: ResBlock, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return original(self, x, emb, context)

    monkeypatch.setattr(ResBlock, "forward", counted)
    unet = network(checkpointed=checkpointed).train(training)
    gradients(unet, dtype=torch.float32)
    blocks = sum(isinstance(module, ResBlock) for module in unet.modules())
    assert calls == times * blocks


def test_weights_keep_their_names() -> None:
    plain, recomputed = network(checkpointed=False), network(checkpointed=True)
    assert plain.state_dict().keys() == recomputed.state_dict().keys()
    plain.load_state_dict(recomputed.state_dict())
