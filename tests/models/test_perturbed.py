"""A UNet whose positions do not see each other: against attention under a mask, where it is so, and that it passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vdm.models import UNet3D, UNetConfig, attention
from vdm.models.attention import SpatialSelfAttention
from vdm.models.operations import attend
from vdm.models.perturbed import perturbed

UNET = UNetConfig(
    in_channels=2, unet_dim=16, channel_mult=(1, 2), attention_levels=(True, False), num_res_blocks=1,
    attention_heads=1, attention_head_dim=16, norm_num_groups=8, context_dim=6,
)  # fmt: skip
DRAW = torch.Generator().manual_seed(1)
INPUTS = (torch.randn(2, 2, 3, 4, 4, generator=DRAW), torch.tensor([3, 700]), torch.randn(4, 5, 6, generator=DRAW))


@pytest.fixture
def unet() -> UNet3D:
    """With weights at random everywhere, for temporal layers begin at zero."""
    torch.manual_seed(0)
    net = UNet3D(UNET).eval()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in which nothing but a position itself is seen."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.eye(q.shape[-2], dtype=torch.bool))


def with_mask(unet: UNet3D, *, root: torch.nn.Module) -> Tensor:
    inside = [module for module in root.modules() if type(module) is SpatialSelfAttention]
    assert inside
    hooks = [module.register_forward_pre_hook(lambda *_: setattr(attention, "attend", alone)) for module in inside]
    hooks += [module.register_forward_hook(lambda *_: setattr(attention, "attend", attend)) for module in inside]
    try:
        return unet(*INPUTS)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def test_it_is_attention_to_oneself(unet: UNet3D) -> None:
    before = unet(*INPUTS)
    middle, everywhere = (perturbed(unet, unet, layers=layers)(*INPUTS) for layers in ("middle", "all"))
    torch.testing.assert_close(middle, with_mask(unet, root=unet.middle))
    torch.testing.assert_close(everywhere, with_mask(unet, root=unet))
    assert torch.equal(unet(*INPUTS), before), "the UNet is as it was"
    for one, other in ((before, middle), (before, everywhere), (middle, everywhere)):
        assert not torch.allclose(one, other, rtol=1e-3)


@torch.no_grad()
def test_the_unet_is_as_it_was_after_an_error(unet: UNet3D) -> None:
    before = unet(*INPUTS)

    def fails(*tensors: Tensor) -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        perturbed(unet, fails, layers="all")(*INPUTS)
    assert torch.equal(unet(*INPUTS), before)
