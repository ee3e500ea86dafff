"""A UNet whose positions do not see each other: what perturbed-attention guidance steers away from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from vdm.models.attention import SpatialSelfAttention, SpatialTransformer
from vdm.models.unet import UNet3D

PerturbedLayers = Literal["middle", "all"]


def perturbed(unet: UNet3D, call: Callable[..., Tensor], *, layers: PerturbedLayers) -> Callable[..., Tensor]:
    """What `call` computes by way of `unet` when self-attention within frames is the identity map there: each position
    attends to itself alone and so takes its own values (Ahn et al. 2024, arXiv 2403.17377).

    `layers`: in the middle block, as that paper has it, or at every level. Meanwhile nothing else may use `unet`.
    """
    root = unet.middle if layers == "middle" else unet
    transformers = [module for module in root.modules() if isinstance(module, SpatialTransformer)]

    def with_own_values(*tensors: Tensor) -> Tensor:
        _set(transformers, True)
        try:
            return call(*tensors)
        finally:
            _set(transformers, False)

    return with_own_values


def _set(transformers: Sequence[SpatialTransformer], perturbed: bool) -> None:
    for transformer in transformers:
        assert isinstance(transformer.block.attn1, SpatialSelfAttention)
        transformer.block.attn1.perturbed = perturbed
