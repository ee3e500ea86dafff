"""Which parameters are about time: one answer for all that treats them apart."""

from __future__ import annotations


def is_temporal(name: str) -> bool:
    """Whether a parameter mixes frames, by its name in the UNet or in the VAE; all others see one frame at a time.

    In the UNet these are the temporal transformer after the first convolution, and the temporal convolutions and
    transformers of its layers; in the VAE the layers over frames that its decoder may have.
    """
    parts = name.split(".")
    return (
        parts[0] == "transformer_in"
        or parts[:2] == ["decoder", "time"]
        or bool({"temporal", "temporal_conv"} & {*parts})
    )


def group_of(part: str, name: str) -> str:
    """The group of a parameter of a part of the model: "spatial", "temporal", or the part itself where it has none."""
    if part not in ("unet", "vae"):
        return part
    return "temporal" if is_temporal(name) else "spatial"
