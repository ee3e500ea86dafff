"""Is it learning? What the loss alone does not say: when in the noise it falls, and whether frames and words count.

Held-out clips are judged at fixed time steps, with fixed noise. A *gain* is what the loss rises by when something is
taken away, with all else the same; one of zero means that the network makes no use of it:

temporal gain: the network sees the noisy frames in another order, and its answers are put back in the right one. A
    frame's noise goes with it, so that to a network that looks at one frame at a time nothing changes, and its gain is
    zero to the bit. (Shuffling the clip beneath noise that stays would pair frames with other noise, and so measure
    that too.) A network that sees all frames but not their order, as attention without convolutions does, gains nothing
    either.
caption gain: the network reads the caption of another held-out clip.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm import dist
from vdm.config import Config
from vdm.diffusion import NoiseSchedule, ddpm_loss
from vdm.training.draws import FRAME_ORDER, HELD_OUT, NOISE, clip_generator
from vdm.training.groups import group_of

NUM_BINS = 4  # quarters of the schedule: t0 is nearly the clip, t3 nearly noise
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
ERROR = "_error"  # after a number's name: its standard error
STILL = 0.2  # of the data's motion; previews with less hardly move
Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t, t, context) -> prediction


# ---- by time step


def by_timestep(losses: Tensor, times: Sequence[int], *, num_steps: int) -> dict[str, Tensor]:
    """Of the clips whose time step lies in bin b, the sum of their losses (B,) as "sum_t<b>" and their number as
    "count_t<b>".

    Both may be averaged over micro-steps and processes, and added over steps: their quotient stays the mean.
    """
    bins = F.one_hot(torch.tensor([t * NUM_BINS // num_steps for t in times]), NUM_BINS).float()
    # Not as a matrix product, whose terms autocast would round; and no step waits here for the GPU.
    sums = (losses.float()[:, None] * bins.to(losses.device, non_blocking=True)).sum(0)
    counts = bins.sum(0)
    return {f"{name}_t{b}": row[b] for name, row in (("sum", sums), ("count", counts)) for b in range(NUM_BINS)}


def means_by_timestep(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`loss_t<b>` over some steps from what `by_timestep` said of each; steps that are not finite do not count."""
    means = {}
    for b in range(NUM_BINS):
        pairs = [(step.get(f"sum_t{b}", 0.0), step.get(f"count_t{b}", 0.0)) for step in steps]
        finite = [pair for pair in pairs if math.isfinite(pair[0])]
        if count := sum(pair[1] for pair in finite):
            means[f"loss_t{b}"] = sum(pair[0] for pair in finite) / count
    return means


def held_out_times(position: int, *, num_steps: int) -> list[int]:
    """The time steps at which held-out clip `position` is judged, one in every bin.

    Where in the bin is the clip's place in the golden ratio's sequence, which spreads any number of clips evenly; so a
    clip is judged at the same steps whatever the run, its seed, and the number of clips.
    """
    place = (position + 0.5) * GOLDEN % 1.0
    return [int((b + place) / NUM_BINS * num_steps) for b in range(NUM_BINS)]


# ---- what is taken away


def other_order(num_frames: int, draw: torch.Generator) -> Tensor:
    """An order of frames that is neither theirs nor, if there are more than two, its reverse; LongTensor (T,)."""
    forth = torch.arange(num_frames)
    refused = [forth] if num_frames == 2 else [forth, forth.flip(0)]
    while num_frames > 1:
        order = torch.randperm(num_frames, generator=draw)
        if not any(torch.equal(order, one) for one in refused):
            return order
    return forth


def in_other_order(network: Network, orders: Tensor) -> Network:
    """The network that sees each clip's frames in the order (B, T), and whose answers are put back."""
    backs = orders.argsort(dim=1)

    def frames(video: Tensor, order: Tensor) -> Tensor:
        return torch.stack([clip[:, index] for clip, index in zip(video, order, strict=True)])

    return lambda x_t, t, context: frames(network(frames(x_t, orders), t, context), backs)


def other_captions(captions: Sequence[str]) -> list[str]:
    """For each clip the caption of another, every caption as often as it is right; its own only where more than half
    of the clips share it.

    The clips in the order of their captions, moved on by half: where no caption stands more often than half of the
    time, none comes upon itself.
    """
    order = sorted(range(len(captions)), key=lambda i: (captions[i], i))
    half = len(order) // 2
    others = {i: captions[order[(rank + half) % len(order)]] for rank, i in enumerate(order)}
    return [others[i] for i in range(len(captions))]


def judge(
    network: Network,
    x0: Tensor,
    *,
    positions: Sequence[int],
    schedule: NoiseSchedule,
    context: Tensor,
    other_context: Tensor | None = None,
    differs: Sequence[bool] = (),
    relate: Callable[[Tensor, torch.Generator], Tensor] = lambda noise, draw: noise,
) -> dict[str, Tensor]:
    """Losses and gains of held-out clips, one number a clip: float32 (B,), `caption_gain` of those that differ alone.

    Args:
        x0: latents (B, C, T, h, w).
        positions: of the clips among those held out, which time steps, noise and orders of frames are drawn by.
        context, other_context: of the right captions and of others (B, L, D); without others there are no gains.
        differs: for each clip whether its other caption is another.
        relate: what becomes of a clip's noise (C, T, h, w) by further draws, in training too.

    Takes NUM_BINS forward passes, and as many for each gain. A clip of one frame has no temporal gain.
    """
    draws = [clip_generator(HELD_OUT, p, NOISE) for p in positions]
    noise = torch.stack([_noise(x0.shape[1:], draw, relate) for draw in draws], dim=1)
    num_steps = schedule.config.num_train_timesteps
    times = torch.tensor([held_out_times(p, num_steps=num_steps) for p in positions]).T

    def losses(network: Network, context: Tensor) -> Tensor:
        rows = [
            ddpm_loss(lambda x, t: network(x, t, context), x0, noise=eps, t=t, schedule=schedule)
            for eps, t in zip(noise.to(x0.device), times.to(x0.device), strict=True)
        ]
        return torch.stack(rows)  # (NUM_BINS, B)

    right = losses(network, context)
    values = {"loss": right.mean(0), **{f"loss_t{b}": row for b, row in enumerate(right)}}
    if other_context is None:
        return values
    if x0.shape[2] > 1:
        orders = torch.stack([other_order(x0.shape[2], clip_generator(HELD_OUT, p, FRAME_ORDER)) for p in positions])
        values["temporal_gain"] = (losses(in_other_order(network, orders.to(x0.device)), context) - right).mean(0)
    gain = (losses(network, other_context) - right).mean(0)
    return {**values, "caption_gain": gain[torch.tensor(differs, device=gain.device)]}


def _noise(shape: Sequence[int], draw: torch.Generator, relate: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
    """One clip's noise in every bin (NUM_BINS, C, T, h, w)."""
    independent = torch.randn(NUM_BINS, *shape, generator=draw)
    return torch.stack([relate(noise, draw) for noise in independent])


# ---- over all clips


class Tally:
    """Numbers of clips, batch by batch."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Numbers of some clips, each (N,)."""
        for name, value in values.items():
            self.values[name].append(value.detach().double().cpu())

    def united(self) -> Tally:
        """This one with those of the other processes, all of which must ask."""
        tally = Tally()
        for values in dist.gathered(dict(self.values)):
            for name, parts in values.items():
                tally.values[name] += parts
        return tally

    def numbers(self) -> dict[str, float]:
        """The mean of each, as "val_<name>"; gains under their own names, with standard errors."""
        numbers = {}
        for name, parts in self.values.items():
            value = torch.cat(parts)
            if not len(value):
                continue
            gain = name.endswith("_gain")
            numbers[name if gain else f"val_{name}"] = float(value.mean())
            if gain and len(value) > 1:
                numbers[f"{name}{ERROR}"] = float(value.std() / math.sqrt(len(value)))
        return numbers


def losses_of(values: Mapping[str, float]) -> dict[str, float]:
    """Those of a validation that compare checkpoints: neither by time step, nor gains."""
    return {name: value for name, value in values.items() if not re.search(rf"_t\d$|_gain({ERROR})?$", name)}


def summary(values: Mapping[str, float]) -> str:
    """A validation in a line."""
    names = [name for name in values if not re.search(rf"_t\d$|{ERROR}$", name)]
    errors = {name: values.get(name + ERROR) for name in names}
    return ", ".join(
        f"{name} {values[name]:.4f}" + ("" if errors[name] is None else f" +- {errors[name]:.4f}") for name in names
    )


def alarms(values: Mapping[str, float], *, step: int, num_steps: int, config: Config) -> list[str]:
    """What looks like a run that does not learn, one sentence each; nothing in its first tenth, or first 200 steps, of
    `num_steps` that it will have."""
    if step < max(200, num_steps // 10):
        return []
    found = []
    if config.model.model_type != "spatial" and _is_zero("temporal_gain", values):
        found.append(
            f"alarm: {_told('temporal_gain', values)} is zero within its error, so the order of frames does not count "
            "yet; look whether the clips move at data.fps, whether grad_norm_temporal is far below grad_norm_spatial, "
            "and at training.temporal_learning_rate"
        )
    if config.training.caption_dropout < 1 and _is_zero("caption_gain", values):
        found.append(
            f"alarm: {_told('caption_gain', values)} is zero within its error, so captions do not count yet; look at "
            "the clips and captions in vdm data view, at text.text_weights and at training.caption_dropout"
        )
    ratio = values.get("motion_ratio")
    if ratio is not None and ratio < STILL:
        found.append(
            f"alarm: previews move {ratio:.2f} times as much as the clips, so they hardly move; look at temporal_gain, "
            "and at sampling.guidance_scale"
        )
    return found


def _is_zero(name: str, values: Mapping[str, float]) -> bool:
    """Whether a gain is less than two standard errors above zero; a number that is not known is not."""
    gain, error = values.get(name), values.get(name + ERROR)
    return gain is not None and error is not None and gain <= 2.0 * error


def _told(name: str, values: Mapping[str, float]) -> str:
    return f"{name} {values[name]:.6f} +- {values[name + ERROR]:.6f}"


# ---- gradients


@torch.no_grad()
def gradient_norms(modules: Mapping[str, nn.Module]) -> dict[str, float]:
    """Euclidean norm of the gradients of every group of parameters, as "grad_norm_<group>"; see `groups.group_of`."""
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for part, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                groups[group_of(part, name)].append(parameter.grad)
    norms = {name: torch.stack(torch._foreach_norm(found)).float().norm() for name, found in groups.items()}
    return {f"grad_norm_{name}": dist.number(norm) for name, norm in norms.items()}
