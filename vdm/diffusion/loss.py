"""The training loss: the squared error of the prediction, in float32, one number a clip."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vdm.diffusion.schedule import NoiseSchedule


def weighted_mse(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over all but the batch of the squared error of (B, ...), times weight (B,); float32 (B,)."""
    return weight * (output.float() - target.float()).square().flatten(1).mean(1)


def ddpm_loss(
    predict: Callable[[Tensor, Tensor], Tensor], x0: Tensor, *, noise: Tensor, t: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """The denoising loss of each clip (Ho et al. 2020, eq. 14, for any prediction type and weight), float32 (B,).

    predict(x_t (B, ...), t (B,)) is the network with its context bound, x0 the clean latents (B, ...), noise a standard
    normal draw of the same shape, t a LongTensor (B,). The caller draws both, so the loss itself is not random.
    """
    output = predict(schedule.add_noise(x0, noise, t), t)
    return weighted_mse(output, schedule.target(x0, noise, t), schedule.loss_weight(t))
