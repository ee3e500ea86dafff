"""The ways to compute temporal attention that benchmarks/attn.py compares: the core alone, and a whole layer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vdm.models.attention import TemporalTransformer
from vdm.models.fused import choose
from vdm.models.operations import attend_frames

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Rival:
    """`lay_out` puts packed qkv (B, F, P, 3, H, D) as it likes best, in one tensor or in three, at no cost; `run` takes
    these. What `run` gives is, from packed order, `see` of it, for the comparison with float64."""

    name: str
    lay_out: Callable[[Tensor], tuple[Tensor, ...]]
    run: Callable[..., Tensor]
    see: Callable[[Tensor, Tensor], Tensor] = lambda out, qkv: out


def _sequences(qkv: Tensor) -> tuple[Tensor, ...]:
    """(B, F, P, 3, H, D) -> 3 x (B*P, H, F, D), contiguous: what SDPA likes."""
    return tuple(one.contiguous() for one in qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2))


def _apart(qkv: Tensor) -> tuple[Tensor, ...]:
    """(B, F, P, 3, H, D) -> 3 x (B, F, P, H, D), contiguous."""
    return tuple(one.contiguous() for one in qkv.unbind(3))


def _packed(out: Tensor, qkv: Tensor) -> Tensor:
    """(B*P, H, F, D) -> (B, F, P, H, D)."""
    return out.unflatten(0, (qkv.shape[0], qkv.shape[2])).permute(0, 3, 1, 2, 4)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bfphd,bgphd->bphfg", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("bphfg,bgphd->bfphd", scores.softmax(-1), v)


def _varlen() -> Rival:
    """flash-attn's own function for sequences of any length, here all of F, one after the other."""
    from flash_attn import flash_attn_varlen_func

    def lay_out(qkv: Tensor) -> tuple[Tensor, ...]:  # 3 x (B*P*F, H, D), and where each sequence begins
        B, frames, P = qkv.shape[:3]
        lines = tuple(one.contiguous() for one in qkv.permute(3, 0, 2, 1, 4, 5).flatten(1, 3))
        starts.update({lines[0].shape[0]: torch.arange(B * P + 1, device=qkv.device, dtype=torch.int32) * frames})
        lengths.update({lines[0].shape[0]: frames})
        return lines

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        begin, frames = starts[q.shape[0]], lengths[q.shape[0]]
        out: Tensor = flash_attn_varlen_func(q, k, v, begin, begin, frames, frames)
        return out

    def see(out: Tensor, qkv: Tensor) -> Tensor:
        return out.unflatten(0, (qkv.shape[0], qkv.shape[2], qkv.shape[1])).transpose(1, 2)

    starts: dict[int, Tensor] = {}
    lengths: dict[int, int] = {}
    return Rival("flash-attn varlen", lay_out, run, see)


def cores(device: torch.device, *, compiled: bool) -> list[Rival]:
    """Ours first. `compiled` adds those that torch.compile makes, which takes seconds a shape."""
    packed = lambda qkv: (qkv,)  # noqa: E731
    rivals = [Rival("vdm sdpa", packed, attend_frames), Rival("einsum", _apart, _einsum)]
    if device.type == "cuda":
        from kernels.temporal_attention import temporal_attention

        rivals.insert(0, Rival("vdm triton", packed, temporal_attention))
    rivals += [Rival(name, _sequences, partial(_sdpa, backend), _packed) for name, backend in BACKENDS.items()]
    if importlib.util.find_spec("flash_attn") is not None and device.type == "cuda":
        rivals.append(_varlen())
    if compiled:
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()  # or shapes seen before make it compile for all shapes
        rivals.append(Rival("einsum compiled", _apart, torch.compile(_einsum, dynamic=False)))
        flex = torch.compile(flex_attention, dynamic=False)
        rivals.append(Rival("flex compiled", _sequences, lambda q, k, v: flex(q, k, v), _packed))
    return rivals


# A whole layer: norm, projections, two attentions, feed-forward, projection, residual


class DiffusersLayer(nn.Module):
    """diffusers' TransformerTemporalModel, from (B*F, C, h, w) as its UNet has it."""

    def __init__(self, channels: int, heads: int, frames: int):
        super().__init__()
        from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

        self.frames = frames
        self.layer = TransformerTemporalModel(heads, channels // heads, in_channels=channels, num_layers=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x, num_frames=self.frames, return_dict=False)[0]
        return out


class OurLayer(nn.Module):
    """Ours, from (B, C, F, h, w) in channels_last_3d memory."""

    def __init__(self, channels: int, heads: int, kernel: Any):
        super().__init__()
        operations = choose(kernel)
        self.layer = TemporalTransformer(channels, heads, channels // heads, 32, operations)
        self.empty = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.empty, self.empty)


def layers(device: torch.device, *, channels: int, heads: int, frames: int, compiled: bool) -> dict[str, nn.Module]:
    """Ours on either kernel, and diffusers' where it is installed. No weights at zero, which would hide half a pass."""
    found: dict[str, nn.Module] = {"vdm sdpa": OurLayer(channels, heads, "sdpa")}
    if device.type == "cuda":
        found = {"vdm triton": OurLayer(channels, heads, "triton"), **found}
    if importlib.util.find_spec("diffusers") is not None:
        found["diffusers"] = DiffusersLayer(channels, heads, frames)
        if compiled:
            found["diffusers compiled"] = torch.compile(DiffusersLayer(channels, heads, frames), dynamic=False)  # type: ignore[assignment]
    for module in found.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
    return found


def layer_input(name: str, clips: Tensor) -> Tensor:
    """A batch (B, C, F, h, w) in channels_last_3d memory, as the layer of that name has it."""
    if name.startswith("diffusers"):
        return clips.transpose(1, 2).flatten(0, 1).contiguous()
    return clips
