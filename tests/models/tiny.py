"""Networks small enough for a test, with every weight drawn at random, and two ways to look into a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from vdm.models import UNet3D, UNetConfig, VAEConfig, VideoVAE

Module = TypeVar("Module", bound=nn.Module)

UNET = UNetConfig(
    unet_dim=8,
    channel_mult=(1, 2),
    attention_levels=(True, False),
    num_res_blocks=1,
    attention_heads=3,
    attention_head_dim=4,
    temporal_layers=2,
    context_dim=6,
    norm_num_groups=2,
)
VAE = VAEConfig(latent_channels=2, vae_channels=(4, 8), layers_per_block=1, vae_norm_num_groups=2)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomise(module: Module, *, seed: int = 0) -> Module:
    """The same module in float64 and eval mode with new weights, also where training starts from zero or one."""
    module = module.double().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1:
            value = noise / math.sqrt(parameter[0].numel())
        else:
            value = 0.3 * noise + float("norm" in name and name.endswith("weight"))
        parameter.data.copy_(value)
    return module


def unet(config: UNetConfig = UNET) -> UNet3D:
    return randomise(UNet3D(config))


def vae(config: VAEConfig = VAE) -> VideoVAE:
    return randomise(VideoVAE(config))


def close(actual: Tensor, expected: Tensor, *, tolerance: float = 1e-9) -> None:
    """Equal but for rounding in float64, relative to the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * max(1.0, expected.abs().max().item()))


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ by far more than rounding."""
    return (a - b).abs().max().item() > 1e-3 * a.abs().max().item()


def copies(run: Callable[[], object], *, numel: int) -> list[list[str]]:
    """For each copy of at least `numel` elements during `run`, the operators it happened in, innermost first.

    `contiguous`, `clone`, `reshape` and `to` all end in `copy_`. The bias that a matrix product or a convolution lays
    into its output before it adds to it is no copy of an activation, and left out.
    """
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    found = []
    for event in profiler.events():
        if event.name != "aten::copy_":
            continue
        callers, parent = [], event.cpu_parent
        while parent is not None:
            callers.append(parent.name)
            parent = parent.cpu_parent
        copied = min(math.prod(shape) for shape in event.input_shapes[:2])
        if copied >= numel and callers[:1] != ["aten::addmm"]:
            found.append(callers)
    return found
