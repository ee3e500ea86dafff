"""Guidance, as a closure around the network: away from a prediction without the text (Ho and Salimans 2022,
arXiv 2207.12598), and away from one of a network that sees less (Ahn et al. 2024, arXiv 2403.17377)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vdm.errors import UserError

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def guided(
    unet: Network,
    context_cond: Tensor,
    context_uncond: Tensor | None,
    *,
    scale: float,
    rescale: float = 0.0,
    at_once: bool = True,
    perturbed: Network | None = None,
    pag_scale: float = 0.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Bind the text, and return denoise(x (B, ...), t (B,)) -> prediction (B, ...) float32.

    The prediction is uncond + scale * (cond - uncond), from one call of unet with the contexts (B, L, D) stacked as
    [uncond; cond] (2B, L, D), for which it returns (2B, ...) in that order; or, not `at_once`, from two calls, in less
    memory. Scale 1 is the conditional and scale 0 the unconditional prediction: these take one context, and need no
    `rescale`. A negative prompt is a context_uncond.

    pag_scale adds so many times what cond has and the prediction of the `perturbed` network has not, before `rescale`;
    that is one more call. Raises UserError if a scale other than 1 has no context_uncond.
    """
    if context_uncond is None and scale != 1.0:
        raise UserError(f"guidance_scale {scale} needs the context of an empty or negative prompt; use 1 to do without")
    own = context_uncond if scale == 0.0 and context_uncond is not None else context_cond
    contexts = None if scale in (0.0, 1.0) or context_uncond is None else torch.cat([context_uncond, context_cond])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if contexts is None:
            output = cond = unet(x, t, own).float()
        else:
            both = unet(x, t, contexts).chunk(2) if at_once else [unet(x, t, one) for one in contexts.chunk(2)]
            uncond, cond = (one.float() for one in both)
            output = uncond + scale * (cond - uncond)
        if perturbed is not None and pag_scale:
            output = output + pag_scale * (cond - perturbed(x, t, own).float())
        return rescale_guidance(output, cond, rescale=rescale) if rescale and output is not cond else output

    return denoise


def rescale_guidance(output: Tensor, cond: Tensor, *, rescale: float) -> Tensor:
    """Bring the spread of each guided prediction back towards that of the conditional one (Lin et al. 2024, eq. 15-16).

    output and cond are (B, ...); rescale in [0, 1] goes from no change to the same standard deviation.
    """
    axes = tuple(range(1, output.ndim))
    tiny = torch.finfo(output.dtype).tiny  # a constant prediction stays itself instead of becoming 0 / 0
    ratio = cond.std(axes, keepdim=True) / output.std(axes, keepdim=True).clamp_min(tiny)
    return output * (rescale * ratio + (1.0 - rescale))
