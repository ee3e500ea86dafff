"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), as a closure around the network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vdm.errors import UserError


def guided(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor],
    context_cond: Tensor,
    context_uncond: Tensor | None,
    *,
    scale: float,
    rescale: float = 0.0,
    at_once: bool = True,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Bind the text, and return denoise(x (B, ...), t (B,)) -> prediction (B, ...) float32.

    The prediction is uncond + scale * (cond - uncond), from one call of unet with the contexts (B, L, D) stacked as
    [uncond; cond] (2B, L, D), for which it returns (2B, ...) in that order; or, not `at_once`, from two calls, in less
    memory. Scale 1 is the conditional and scale 0 the unconditional prediction: these take one context, and `rescale`
    does not apply. A negative prompt is a context_uncond. Raises UserError if a scale other than 1 has none.
    """
    if scale == 1.0:
        return lambda x, t: unet(x, t, context_cond).float()
    if context_uncond is None:
        raise UserError(f"guidance_scale {scale} needs the context of an empty or negative prompt; use 1 to do without")
    if scale == 0.0:
        return lambda x, t: unet(x, t, context_uncond).float()
    contexts = torch.cat([context_uncond, context_cond])  # (2B,L,D)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if at_once:
            uncond, cond = unet(x, t, contexts).float().chunk(2)
        else:
            uncond, cond = (unet(x, t, context).float() for context in contexts.chunk(2))
        output = uncond + scale * (cond - uncond)
        return rescale_guidance(output, cond, rescale=rescale) if rescale else output

    return denoise


def rescale_guidance(output: Tensor, cond: Tensor, *, rescale: float) -> Tensor:
    """Bring the spread of each guided prediction back towards that of the conditional one (Lin et al. 2024, eq. 15-16).

    output and cond are (B, ...); rescale in [0, 1] goes from no change to the same standard deviation.
    """
    axes = tuple(range(1, output.ndim))
    tiny = torch.finfo(output.dtype).tiny  # a constant prediction stays itself instead of becoming 0 / 0
    ratio = cond.std(axes, keepdim=True) / output.std(axes, keepdim=True).clamp_min(tiny)
    return output * (rescale * ratio + (1.0 - rescale))
