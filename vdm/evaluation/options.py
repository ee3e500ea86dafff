"""The choices of protocol: published numbers were made by all of them, and each gives another metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from vdm.errors import UserError
from vdm.metrics import clip_pixels
from vdm.metrics.fvd import EPS, EPS_OF_VIDEOGPT, FVDProtocol
from vdm.metrics.resize import Fit, Interp

Cov = Literal["unbiased", "biased"]
CHOICES: dict[str, tuple[object, ...]] = {
    "resize": get_args(Fit),
    "interp": get_args(Interp),
    "bn_eps": (EPS, EPS_OF_VIDEOGPT),
    "cov": get_args(Cov),
    "clip_resize": get_args(clip_pixels.Fit),
}


@dataclass(frozen=True)
class Options:
    """How clips are shown to I3D (`resize`, `interp`) and to CLIP (`clip_resize`), I3D's `bn_eps`, and by what the
    covariances of all Frechet distances are divided: N - 1 ("unbiased") or N. Raises UserError for other values."""

    resize: Fit = "squash"
    interp: Interp = "torch"
    bn_eps: float = EPS
    cov: Cov = "unbiased"
    clip_resize: clip_pixels.Fit = "crop"

    def __post_init__(self) -> None:
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                listed = ", ".join(f"{value}" for value in values)
                raise UserError(f"--{name} is {getattr(self, name)}; it must be one of {listed}")

    def of_i3d(self, *, repeat: Literal[1, 2]) -> FVDProtocol:
        """With each frame shown so often."""
        return FVDProtocol(resize=self.resize, interp=self.interp, bn_eps=self.bn_eps, repeat=repeat)


USUAL = Options()
