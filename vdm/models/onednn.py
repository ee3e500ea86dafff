"""Products and convolutions by oneDNN, in float32 on a CPU: linear layers always, and with packed weights in sampling.

oneDNN multiplies by weights in an order of its own, into which PyTorch brings them at every call. `packed` keeps them
in that order from call to call: of a layer with few rows or pixels, that is up to a third of its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
TIMES = "mkldnn::_linear_pointwise.binary"  # a linear layer's result, times another tensor
# Bytes of a network's weights up to which `packed` keeps them twice. Beside a larger one there may be no room.
PACKED = 2**30
# Pixels of a picture up to which a larger kernel is made one matrix, with up to twice a kernel's numbers (seven times
# where the picture is doubled first).
SMALL = 4


def _imagine(name: str, sizes: Callable[..., Tensor]) -> None:
    """Say of an operator of oneDNN, which has sizes for no tensors without memory, what its result is like."""
    if ONEDNN and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"):
        torch.library.register_fake(name, sizes)


_imagine(TIMES, lambda x, other, weight, bias, attr: x.new_empty(*x.shape[:-1], weight.shape[0]))


def _in_blocks(of: int) -> Callable[..., Tensor]:
    """Packed weights are in blocks of rows, of which the last is filled up: of so many, on CPUs of 512-bit vectors."""
    return lambda weight, *how: weight.new_empty(-(-len(weight) // of) * of, *weight.shape[1:])[: len(weight)]


_imagine("mkldnn::_reorder_linear_weight", _in_blocks(64))
_imagine("mkldnn::_reorder_convolution_weight", _in_blocks(16))


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies: float32 on a CPU, as it stands and not to be cast or compiled."""
    return (
        ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
    )


class Packable:
    """What a layer has that `packed` may keep weights of: by their names, None while it is not in force."""

    packs: dict[str, Any] | None = None


@contextmanager
def packed(module: nn.Module) -> Iterator[None]:
    """Meanwhile, layers of `module` keep weights as oneDNN has them, once it multiplies by them without gradients.

    The weights must not change meanwhile. Of two such contexts at a time the first to end ends both.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Packable)]
    size = sum(weight.numel() * weight.element_size() for weight in module.parameters())
    try:
        for layer in layers:
            layer.packs = {} if size <= PACKED else None
        yield
    finally:
        for layer in layers:
            layer.packs = None


def _kept(packs: dict[str, Any], name: str, make: Callable[[], Any]) -> Any:
    pack = packs.get(name)
    if pack is None:
        pack = packs[name] = make()
    return pack


def linear(layer: Any, x: Tensor) -> Tensor:
    """(..., in) -> (..., out) by a layer where `by_onednn`."""
    if torch.is_grad_enabled():
        return _Product.apply(x, layer.weight, layer.bias)
    return _product(x, _linear_weight(layer, "weight", layer.weight, x), layer.bias)


def linear_geglu(layer: Any, x: Tensor) -> Tensor:
    """`geglu` of a linear layer where `by_onednn`, without gradients: (..., in) -> (..., W) for a weight (2W, in).
    oneDNN gates the product before it leaves the caches, and nothing is written that is twice as wide."""
    (value, gate), (bias_value, bias_gate) = layer.weight.chunk(2), layer.bias.chunk(2)
    gate, value = _linear_weight(layer, "gate", gate, x), _linear_weight(layer, "value", value, x)
    gated = torch.ops.mkldnn._linear_pointwise(x, gate, bias_gate, "gelu", [], "none")
    return torch.ops.mkldnn._linear_pointwise.binary(x, gated, value, bias_value, "mul")


def _linear_weight(layer: Packable, name: str, weight: Tensor, x: Tensor) -> Tensor:
    if (packs := layer.packs) is None:
        return weight
    rows = x.shape[:-1].numel()
    return _kept(packs, name, lambda: torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """`_product`, which has no gradient of its own. That of the weights is faster by PyTorch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t()) if of_x else None,
            rows.t() @ x.flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def keeps(layer: Any, x: Tensor) -> bool:
    """Whether a layer is `packed`, and its kept weights serve for x."""
    return getattr(layer, "packs", None) is not None and not torch.is_grad_enabled() and by_onednn(x, layer.weight)


def convolve(
    layer: Any,
    name: str,
    weight: Callable[[], Tensor],
    bias: Tensor | None,
    x: Tensor,
    *,
    padding: Sequence[int] | str,
    stride: Sequence[int] = (1, 1),
) -> Tensor:
    """The 2-D convolution of (N, C, H, W) by what `weight` makes of the layer's: once, while it is `packed`, and then
    kept by `name`."""
    if not keeps(layer, x):
        return F.conv2d(x, weight(), bias, stride, padding)
    if small(layer, x):
        return by_matrix(layer, name, lambda x, taps: F.conv2d(x, taps, None, stride, padding), weight, bias, x)
    how = (padding, stride, (1, 1), 1)  # dilation and groups

    def pack() -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight().detach(), *how, x.shape)

    return torch.ops.mkldnn._convolution_pointwise(x, _kept(layer.packs, name, pack), bias, *how, "none", [], "")


def small(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> bool:
    """Whether most taps of the layer's kernel fall beside the pictures (N, C, H, W)."""
    return x.shape[2:].numel() <= SMALL < layer.weight.shape[2:].numel()


def by_matrix(
    layer: Any,
    name: str,
    convolution: Callable[[Tensor, Tensor], Tensor],
    weight: Callable[[], Tensor],
    bias: Tensor | None,
    x: Tensor,
) -> Tensor:
    """`convolution` of (N, C, H, W) and weights (out, C, kh, kw), plus bias, as one product of whole pictures and a
    matrix, which has no taps that fall beside them. The layer is `packed`."""
    channels, *size = x.shape[1:]

    def pack() -> tuple[Tensor, torch.Size]:
        taps = weight().detach()
        each = torch.eye(taps[0, 0].numel(), dtype=x.dtype).unflatten(1, (1, *taps.shape[2:]))
        pixels = torch.eye(size[0] * size[1], dtype=x.dtype).unflatten(1, (1, *size))
        reach = convolution(pixels, each)  # (H*W, kh*kw, H', W'): how often a tap carries a pixel to another
        matrix = torch.einsum("oik,pkq->qopi", taps.flatten(2), reach.flatten(2)).flatten(2).flatten(0, 1)
        return torch.ops.mkldnn._reorder_linear_weight(matrix, len(x)), reach.shape[2:]

    matrix, (height, width) = _kept(layer.packs, f"{name} of {size}", pack)
    pictures = x.permute(0, 2, 3, 1).flatten(1)
    y = _product(pictures, matrix, None if bias is None else bias.repeat(height * width))
    return y.unflatten(1, (height, width, -1)).permute(0, 3, 1, 2)
