"""The noise schedule: how much of the clip and how much noise there is at each step, and what the network predicts.

Notation: alpha_bar is the cumulative product of 1 - beta; signal = sqrt(alpha_bar) and noise = sqrt(1 - alpha_bar) are
the two amplitudes of x_t = signal * x0 + noise * eps; snr = alpha_bar / (1 - alpha_bar). Everything is computed once in
float64 and kept in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vdm.errors import UserError

# Below this the clip is drowned out for float32 arithmetic: such a schedule wants zero_terminal_snr instead.
SMALLEST_ALPHA_BAR = 1e-20


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process and the training target; `beta_start` and `beta_end` do not apply to the cosine schedule.

    noise_shift: s multiplies noise / signal at every step by s (Hoogeboom et al. 2023, "simple diffusion", eq. 3-4).
    zero_terminal_snr: the last step is pure noise (Lin et al. 2024, arXiv 2305.08891, algorithm 1); after noise_shift.
    loss_weighting: see `NoiseSchedule.loss_weight`; min_snr_gamma is the clamp of "min_snr" and of "velocity".
    trained_betas: the schedule itself, one number a step, instead of a named one; noise_shift and zero_terminal_snr
        still apply.
    timestep_spacing, steps_offset, set_alpha_to_one: the subset of steps a sampler visits, and the alpha_bar on which
        DDIM ends (1, or that of step 0); steps_offset is for "leading" only. Same meaning as in diffusers, and
        "modelscope" is the original's: 1, 1 + s, 1 + 2s ... with s = num_train_timesteps // num_steps, to the end.
    ddim_stride: DDIM steps from each timestep to the next one "visited"; or by the "constant" s as the original and
        diffusers do, which leads to the same where num_steps divides num_train_timesteps (not with "linspace").
    clip_sample (to +-clip_sample_range), thresholding (dynamic, Saharia et al. 2022, arXiv 2205.11487, section 2.3; per
        frame) limit the predicted clip x0 at each step. Same meaning as in diffusers, where latents need neither.
    """

    num_train_timesteps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: Literal["epsilon", "v", "x0"] = "epsilon"
    zero_terminal_snr: bool = False
    noise_shift: float = 1.0
    loss_weighting: Literal["uniform", "min_snr", "velocity"] = "uniform"
    min_snr_gamma: float = 5.0
    trained_betas: tuple[float, ...] | None = None
    timestep_spacing: Literal["trailing", "leading", "linspace", "modelscope"] = "trailing"
    steps_offset: int = 1
    set_alpha_to_one: bool = True
    ddim_stride: Literal["visited", "constant"] = "visited"
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def __post_init__(self) -> None:
        _one_of("beta_schedule", self.beta_schedule, ("linear", "scaled_linear", "cosine"))
        _one_of("prediction_type", self.prediction_type, ("epsilon", "v", "x0"))
        _one_of("loss_weighting", self.loss_weighting, ("uniform", "min_snr", "velocity"))
        _one_of("timestep_spacing", self.timestep_spacing, ("trailing", "leading", "linspace", "modelscope"))
        _one_of("ddim_stride", self.ddim_stride, ("visited", "constant"))
        if self.num_train_timesteps < 2:
            raise UserError(f"num_train_timesteps is {self.num_train_timesteps}; it must be 2 or more, such as 1000")
        if not 0.0 < self.beta_start < 1.0:
            raise UserError(f"beta_start is {self.beta_start}; it must lie between 0 and 1, such as 0.00085")
        if not self.beta_start <= self.beta_end < 1.0:
            raise UserError(f"beta_end is {self.beta_end}; it must lie between beta_start ({self.beta_start}) and 1")
        if not 0.0 < self.noise_shift < math.inf:
            raise UserError(f"noise_shift is {self.noise_shift}; it must be positive, and 1 changes nothing")
        if not 0.0 < self.min_snr_gamma < math.inf:
            raise UserError(f"min_snr_gamma is {self.min_snr_gamma}; it must be positive, such as 5")
        if not 0 <= self.steps_offset < self.num_train_timesteps:
            raise UserError(f"steps_offset is {self.steps_offset}; it must be 0 or more and below num_train_timesteps")
        for name, least in (("clip_sample_range", 0.0), ("sample_max_value", 1.0)):
            if not least <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least:g}")
        if not 0.0 < self.dynamic_thresholding_ratio <= 1.0:
            raise UserError(
                f"dynamic_thresholding_ratio is {self.dynamic_thresholding_ratio}; it must lie above 0 and up to 1"
            )
        self._check_betas()
        if self.ends_in_noise and self.prediction_type == "epsilon":
            raise UserError(
                "prediction_type epsilon cannot be used with zero_terminal_snr, since pure noise says nothing of the "
                "clip; set prediction_type to v or x0"
            )

    def _check_betas(self) -> None:
        if self.trained_betas is None:
            return
        object.__setattr__(self, "trained_betas", betas := tuple(self.trained_betas))
        if len(betas) != self.num_train_timesteps:
            raise UserError(f"trained_betas holds {len(betas)} numbers; it must hold num_train_timesteps of them")
        if not all(0.0 < beta < 1.0 for beta in betas[:-1]) or not 0.0 < betas[-1] <= 1.0:
            raise UserError("trained_betas must lie between 0 and 1, and only the last may be 1 (zero terminal SNR)")

    @property
    def ends_in_noise(self) -> bool:
        """Whether nothing of the clip is left at the last step."""
        return self.zero_terminal_snr or (self.trained_betas is not None and self.trained_betas[-1] == 1.0)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


class NoiseSchedule(nn.Module):
    """The forward process q(x_t | x0) and the conversions between what a network may predict.

    Throughout, t is a LongTensor (B,) with values in [0, num_train_timesteps); x0, noise and x_t are (B, ...). Results
    are float32 for any lower precision of the arguments. The buffers are not persistent: the config is the truth.
    """

    betas: Tensor  # (N,) float32, in (0, 1]; 1 only at the end, with zero_terminal_snr
    alphas_cumprod: Tensor  # (N,) float32, in (0, 1]; 0 only at the end, with zero_terminal_snr
    signal: Tensor  # (N,) sqrt(alphas_cumprod)
    noise: Tensor  # (N,) sqrt(1 - alphas_cumprod), never 0
    snrs: Tensor  # (N,)
    loss_weights: Tensor  # (N,)

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        # 1 - alpha_bar is carried beside alpha_bar: near t = 0 the subtraction would cost most of its digits.
        alpha_bar, noise_bar = _forward_process(config)
        self._alpha_bar: list[float] = alpha_bar.tolist()
        self._betas = _betas(alpha_bar)
        snr = alpha_bar / noise_bar
        tables = {
            "betas": self._betas,
            "alphas_cumprod": alpha_bar,
            "signal": alpha_bar.sqrt(),
            "noise": noise_bar.sqrt(),
            "snrs": snr,
            "loss_weights": _loss_weights(snr, config),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Draw x_t given x0: mean signal * x0, variance 1 - alpha_bar (Ho et al. 2020, eq. 4)."""
        return _at(self.signal, t, x0) * x0 + _at(self.noise, t, x0) * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = signal * noise - noise_amplitude * x0 (Salimans and Ho 2022, section 4)."""
        return _at(self.signal, t, x0) * noise - _at(self.noise, t, x0) * x0

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is asked for, by config.prediction_type."""
        if self.config.prediction_type == "epsilon":
            return noise
        return x0 if self.config.prediction_type == "x0" else self.velocity(x0, noise, t)

    def predictions(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the network's output at x_t into its (x0, eps); finite at alpha_bar = 0 too."""
        signal, noise = _at(self.signal, t, x_t), _at(self.noise, t, x_t)
        return self.predictions_at(output, x_t, signal=signal, noise=noise)

    def predictions_at(
        self, output: Tensor, x_t: Tensor, *, signal: Tensor | float, noise: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """As `predictions`, at a step that is given by its two amplitudes."""
        if self.config.prediction_type == "epsilon":
            return (x_t - noise * output) / signal, output
        if self.config.prediction_type == "x0":
            return output, (x_t - signal * output) / noise
        return signal * x_t - noise * output, signal * output + noise * x_t

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) at t, float32 (B,)."""
        return self.snrs[t]

    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight (B,) of the squared error in the space of the prediction.

        "uniform" is 1. The two others state one weight of the x0 error, whatever is predicted: "min_snr" is
        min(snr, gamma) (Hang et al. 2023, arXiv 2303.09556, eq. 5); "velocity" is min(snr + 1, gamma), the plain v loss
        with its weight near t = 0 clamped. An epsilon error is an x0 error times snr, a v error one times snr + 1.
        """
        return self.loss_weights[t]

    def timesteps(self, num_steps: int) -> Tensor:
        """The steps a sampler visits, LongTensor (num_steps,), descending; the integers of diffusers' DDIMScheduler.

        "trailing", and "linspace" from two steps on, start at the last step, as they must with zero terminal SNR
        (Lin et al. 2024, table 2). "modelscope" visits more than num_steps where that does not divide
        num_train_timesteps.
        Raises UserError if the schedule has no num_steps such steps.
        """
        total, offset = self.config.num_train_timesteps, self.config.steps_offset
        if not 1 <= num_steps <= total:
            raise UserError(f"there are {num_steps} sampling steps; use 1 to {total} (num_train_timesteps)")
        if self.config.timestep_spacing == "trailing":
            stride = (total - total / num_steps) - total  # rounded as np.arange does, for the same ties as diffusers
            steps = [round(total + index * stride) - 1 for index in range(num_steps)]
        elif self.config.timestep_spacing == "linspace":
            steps = np.linspace(0, total - 1, num_steps).round().astype(int).tolist()[::-1]
        elif self.config.timestep_spacing == "modelscope":
            steps = [min(step + 1, total - 1) for step in range(0, total, total // num_steps)][::-1]
        else:
            steps = [index * (total // num_steps) + offset for index in range(num_steps - 1, -1, -1)]
        if steps[0] >= total:
            raise UserError(
                f"{num_steps} sampling steps with steps_offset {offset} would start at step {steps[0]} of {total}; "
                "use fewer steps, or timestep_spacing trailing"
            )
        return torch.tensor(steps, dtype=torch.long, device=self.betas.device)

    def transitions(
        self, num_steps: int, *, end: float, stride: Literal["visited", "constant"] = "visited"
    ) -> list[tuple[int, float, float]]:
        """(t, alpha_bar at t, alpha_bar at the step it leads to) in float64, for each step; below step 0 it is `end`.

        Where a step leads to is said by `stride`, see `DiffusionConfig.ddim_stride`.
        """
        steps: list[int] = self.timesteps(num_steps).tolist()
        back = self.config.num_train_timesteps // num_steps
        following = [*steps[1:], -1] if stride == "visited" else [step - back for step in steps]
        return [
            (step, self._alpha_bar[step], self._alpha_bar[then] if then >= 0 else end)
            for step, then in zip(steps, following, strict=True)
        ]

    @property
    def final_alpha_cumprod(self) -> float:
        """The alpha_bar on which DDIM ends: 1, or that of step 0 when config.set_alpha_to_one is false."""
        return 1.0 if self.config.set_alpha_to_one else self._alpha_bar[0]

    def trained_betas(self) -> list[float]:
        """The betas in float64, from which diffusers' `trained_betas` rebuilds this very schedule."""
        return self._betas.tolist()


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t] (B,) as (B, 1, ...), to broadcast over `like`; a float32 tensor with axes, so it promotes halves."""
    return table[t].reshape(-1, *[1] * (like.ndim - 1))


def _forward_process(config: DiffusionConfig) -> tuple[Tensor, Tensor]:
    """(alpha_bar, 1 - alpha_bar) of every step, float64 (N,): schedule, then noise shift, then zero terminal SNR."""
    log_alpha_bar = torch.log1p(-_schedule_betas(config)).cumsum(0)  # -inf at the end, where the last beta is 1
    alpha_bar, noise_bar = log_alpha_bar.exp(), -torch.expm1(log_alpha_bar)
    shifted = config.noise_shift**2 * noise_bar
    alpha_bar, noise_bar = alpha_bar / (alpha_bar + shifted), shifted / (alpha_bar + shifted)
    last = alpha_bar[-2 if config.trained_betas is not None and config.ends_in_noise else -1]
    if not last > SMALLEST_ALPHA_BAR or not noise_bar[0] > SMALLEST_ALPHA_BAR:
        betas = "trained_betas" if config.trained_betas is not None else f"beta_end {config.beta_end}"
        raise UserError(
            f"{betas} and noise_shift {config.noise_shift} over {config.num_train_timesteps} steps "
            f"take alphas_cumprod from {alpha_bar[0]:.3g} to {last:.3g}, beyond what float32 can tell from 1 "
            "and 0; bring them closer to beta_end 0.012 and noise_shift 1"
        )
    if config.zero_terminal_snr:
        alpha_bar = _zero_terminal_snr(alpha_bar)
        noise_bar = torch.cat([noise_bar[:1], 1.0 - alpha_bar[1:]])  # the first step is left as it was
    return alpha_bar, noise_bar


def _schedule_betas(config: DiffusionConfig) -> Tensor:
    """The betas of the named schedule, float64 (N,); on the CPU even where a default device such as meta is set."""
    steps, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        return torch.tensor(config.trained_betas, dtype=torch.float64, device="cpu")
    if config.beta_schedule == "linear":  # Ho et al. 2020
        return torch.linspace(start, end, steps, dtype=torch.float64, device="cpu")
    if config.beta_schedule == "scaled_linear":  # Rombach et al. 2022: linear in the square root
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64, device="cpu") ** 2
    # Nichol and Dhariwal 2021, eq. 17, with their s = 0.008 and their clip of beta at 0.999
    time = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
    alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def _zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that it ends at 0 and starts where it did (Lin et al. 2024, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def _betas(alpha_bar: Tensor) -> Tensor:
    return 1.0 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


def _loss_weights(snr: Tensor, config: DiffusionConfig) -> Tensor:
    """See `NoiseSchedule.loss_weight`; float64 (N,), finite also where snr is 0."""
    if config.loss_weighting == "uniform":
        return torch.ones_like(snr)
    x0_weight = (snr if config.loss_weighting == "min_snr" else snr + 1.0).clamp(max=config.min_snr_gamma)
    per_x0_error = {"epsilon": snr, "v": snr + 1.0, "x0": torch.ones_like(snr)}
    return x0_weight / per_x0_error[config.prediction_type]
