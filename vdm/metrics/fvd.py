"""Clips to the features whose Frechet distance is FVD (Unterthiner et al. 2018), and what each variant is called.

The distance itself is in `frechet.py`. Nothing here depends on the batch: each clip goes through the network alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdm.errors import UserError
from vdm.metrics.exact import full_precision
from vdm.metrics.i3d import I3D, MIN_FRAMES, SIZE, Layer
from vdm.metrics.resize import Fit, Interp, as_uint8, resize

EPS, EPS_OF_VIDEOGPT = 1e-3, 1e-5


@dataclass(frozen=True)
class FVDProtocol:
    """How clips become features; it belongs into a record as it stands, for any other value is another metric.

    resize, interp: see `resize`. For square clips both ways of resizing are one.
    layer: "logits400", by which FVD is defined, or "pool1024", which some code takes; that has another name.
    bn_eps: 1e-3 as the original; 1e-5 gives the tables of VideoGPT, TATS, LVDM and cd-fvd.
    repeat: 2 shows each frame twice, for clips of 5 to 8 frames, which I3D is too deep for; that has another name.
    """

    resize: Fit = "squash"
    interp: Interp = "torch"
    layer: Layer = "logits400"
    bn_eps: float = EPS
    repeat: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        choices: dict[str, tuple[object, ...]] = {
            "resize": get_args(Fit),
            "interp": get_args(Interp),
            "layer": get_args(Layer),
            "bn_eps": (EPS, EPS_OF_VIDEOGPT),
            "repeat": (1, 2),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                listed = ", ".join(str(value) for value in values)
                raise UserError(f"FVD's {name} is {getattr(self, name)!r}; it must be one of {listed}")

    def name(self, metric: str) -> str:
        """What a metric of these features is called: `metric` ("fvd", "kvd", "fvd_i3d_imagenet") and what differs."""
        layer = "" if self.layer == "logits400" else f"_{self.layer}"
        return metric + layer + ("" if self.repeat == 1 else f"_rep{self.repeat}")


def repeats(num_frames: int) -> Literal[1, 2]:
    """How often clips of so many frames must show each of them. Raises UserError below 5, where twice is too little."""
    if 2 * num_frames < MIN_FRAMES:
        least = -(-MIN_FRAMES // 2)
        raise UserError(
            f"FVD needs clips of {MIN_FRAMES} frames, or {least} shown twice, not {num_frames}; make longer ones"
        )
    return 1 if num_frames >= MIN_FRAMES else 2


def i3d_features(clips: Tensor | npt.NDArray[np.uint8], net: I3D, *, protocol: FVDProtocol | None = None) -> Tensor:
    """clips uint8 (B,T,H,W,3) -> float32 (B,400), or (B,1024) of "pool1024", on the CPU; computed where `net` is.

    Raises UserError where T does not suit `protocol.repeat` (see `repeats`), and ValueError for other shapes, a net of
    another bn_eps than the protocol's, and features that are not numbers.
    """
    protocol = protocol or FVDProtocol()
    clips = as_uint8(clips)
    if clips.dim() != 5:
        raise ValueError(f"clips are uint8 (B, T, H, W, 3), not {tuple(clips.shape)}")
    if net.bn_eps != protocol.bn_eps:
        raise ValueError(f"the net's bn_eps is {net.bn_eps}, the protocol's {protocol.bn_eps}")
    if repeats(clips.shape[1]) != protocol.repeat:
        asks = f"FVD of clips of {clips.shape[1]} frames needs repeat={repeats(clips.shape[1])}"
        raise UserError(f"{asks}, not {protocol.repeat}: I3D takes {MIN_FRAMES} frames or more")
    device = net.logits.conv3d.weight.device
    width = 400 if protocol.layer == "logits400" else 1024
    features = torch.empty(len(clips), width)
    with full_precision(device):
        for index, clip in enumerate(clips):
            features[index] = net.features(_to_net(clip.to(device), protocol)[None], layer=protocol.layer)[0]
    if not features.isfinite().all():
        raise ValueError("I3D made features that are not finite numbers: its weights are damaged")
    return features


def _to_net(clip: Tensor, protocol: FVDProtocol) -> Tensor:
    """uint8 (T,H,W,3) -> float32 (3,T,224,224) in [-1,1]."""
    frames = resize(clip, SIZE, fit=protocol.resize, interp=protocol.interp)
    video = frames.div_(127.5).sub_(1.0).movedim(1, 0)
    return video.repeat_interleave(protocol.repeat, dim=1).contiguous()


class Check(NamedTuple):
    """One golden number; `ok` says that what was found is near enough."""

    name: str
    expected: float
    found: float
    ok: bool


# Of StyleGAN-V's network, by frames a clip; TensorFlow's own gives 151.39 for 30.
_BLACK_TO_WHITE = {16: 152.92, 30: 151.26}


def selftest(net: I3D) -> list[Check]:
    """Whether these are the weights that FVD is defined by, and rightly used: FVD of black clips to white ones.

    Neither set varies, so it is the squared distance of two logit vectors, whatever the size and the resizing; known
    within 1. Raises ValueError for a net of another bn_eps than 1e-3, of which nothing is known.
    """
    if net.bn_eps != EPS:
        raise ValueError(f"the golden numbers are of bn_eps {EPS}, not {net.bn_eps}")
    checks = []
    for frames, expected in _BLACK_TO_WHITE.items():
        clip = torch.zeros(1, frames, SIZE, SIZE, 3, dtype=torch.uint8)
        black, white = i3d_features(clip, net)[0], i3d_features(clip + 255, net)[0]
        found = (black.double() - white.double()).square().sum().item()
        checks.append(Check(f"black to white clips of {frames} frames", expected, found, abs(found - expected) <= 1.0))
    return checks
