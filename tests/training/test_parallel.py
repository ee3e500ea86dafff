"""Activation checkpointing: less memory, the same numbers."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.memory import LiveBytes
from vdm.models import UNet3D, UNetConfig
from vdm.models.blocks import ResBlock
from vdm.models.dropout import clip_seeds
from vdm.models.vae import VAEConfig, VideoVAE
from vdm.text.encoder import TextConfig, TextEncoder
from vdm.training.parallel import checkpoint_activations, parallelize
from vdm.training.recompute import is_expensive
from vdm.training.settings import Recompute, TrainingConfig

CONFIG = UNetConfig(
    unet_dim=16,
    channel_mult=(1, 2),
    attention_levels=(True, False),
    num_res_blocks=1,
    attention_heads=1,
    attention_head_dim=16,
    temporal_layers=2,
    context_dim=8,
    norm_num_groups=4,
    dropout=0.2,
    temporal_dropout=0.2,
)


def network(how: Recompute) -> UNet3D:
    torch.manual_seed(0)
    unet = UNet3D(CONFIG)
    with torch.no_grad():
        for parameter in unet.parameters():  # zero-initialised layers would hide the dropout before them
            parameter += 0.1 * torch.randn(parameter.shape)
    checkpoint_activations(unet, how=how)
    return unet


def gradients(unet: UNet3D, *, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 4, 3, 4, 4, generator=generator), torch.randn(2, 5, 8, generator=generator)
    torch.manual_seed(7)  # of the dropout
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        output = unet(latents, torch.tensor([3, 900]), context)
    output.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["cheap", "block"])
def test_gradients_are_the_same_with_dropout(how: Recompute, dtype: torch.dtype) -> None:
    plain, recomputed = (gradients(network(mode).train(), dtype=dtype) for mode in ("none", how))
    assert plain.keys() == recomputed.keys() == dict(network("none").named_parameters()).keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
    other = gradients(network("none").eval(), dtype=dtype)
    assert any(not torch.equal(gradient, other[name]) for name, gradient in plain.items()), "there was dropout"


@pytest.mark.parametrize(
    ("how", "training", "times"), [("none", True, 1), ("cheap", True, 2), ("block", True, 2), ("block", False, 1)]
)
def test_layers_run_twice_only_where_they_are_recomputed(
    monkeypatch: pytest.MonkeyPatch, how: Recompute, training: bool, times: int
) -> None:
    calls = 0
    original = ResBlock.forward

    def counted(self: ResBlock, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return original(self, x, emb, context)

    monkeypatch.setattr(ResBlock, "forward", counted)
    unet = network(how).train(training)
    gradients(unet, dtype=torch.float32)
    blocks = sum(isinstance(module, ResBlock) for module in unet.modules())
    assert calls == times * blocks


def test_weights_keep_their_names() -> None:
    plain, recomputed = network("none"), network("cheap")
    assert plain.state_dict().keys() == recomputed.state_dict().keys()
    plain.load_state_dict(recomputed.state_dict())


class Counted(TorchDispatchMode):
    """How often each operation really ran."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[Any] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times[operation] += 1
        return operation(*args, **(kwargs or {}))


def operations(how: Recompute) -> tuple[Counter[Any], Counter[Any]]:
    """Those of one pass there and back: the expensive ones, and the others."""
    unet = network(how).train()
    with Counted() as counted:
        gradients(unet, dtype=torch.float32)
    parts = Counter[Any](), Counter[Any]()
    for operation, times in counted.times.items():
        parts[0 if is_expensive(operation) else 1][operation] = times
    return parts


def test_cheap_repeats_nothing_that_is_expensive() -> None:
    (plain, plain_rest), (cheap, cheap_rest), (block, _) = (operations(how) for how in ("none", "cheap", "block"))
    assert plain == cheap and sum(plain.values()) > 50
    aten = torch.ops.aten
    assert {aten.convolution.default, torch.ops.mkldnn._linear_pointwise.default, aten.mm.default} <= set(plain)
    assert all(block[operation] >= times for operation, times in plain.items())
    assert block[aten.convolution.default] > cheap[aten.convolution.default]
    norms, activations = (aten.native_group_norm, aten.native_layer_norm), (aten.silu, aten.gelu)
    for again in (*(op.default for op in (*norms, *activations)), aten.bernoulli_.float):
        assert cheap_rest[again] > plain_rest[again] > 0, f"{again} is cheap"


@pytest.mark.parametrize(
    ("name", "expensive"),
    [("mm", True), ("convolution", True), ("_scaled_dot_product_cudnn_attention", True), ("gelu", False), ("t", False)],
)
def test_what_counts_as_expensive(name: str, expensive: bool) -> None:
    assert is_expensive(getattr(torch.ops.aten, name).default) is expensive


def kept_by(module: nn.Module, work: Any) -> tuple[int, list[Tensor]]:
    """The bytes that the backward pass holds on to, and its gradients."""
    with LiveBytes() as live:
        loss = work(module).float().square().mean()
        kept = live.now
    loss.backward()
    return kept, [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("how", ["cheap", "block"])
@pytest.mark.parametrize("kind", ["unet", "vae", "text"])
def test_every_network_keeps_less(kind: str, how: Recompute) -> None:
    results = []
    video = torch.randn(1, 3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    for mode in ("none", how):
        torch.manual_seed(0)
        if kind == "unet":
            module: nn.Module = UNet3D(CONFIG).train()
            work = lambda unet: unet(torch.ones(1, 4, 2, 8, 8), torch.tensor([3]), torch.ones(1, 5, 8))  # noqa: E731
        elif kind == "vae":
            shape = VAEConfig(vae_channels=(8, 16), vae_norm_num_groups=4, layers_per_block=1, temporal_decoder=True)
            module = VideoVAE(shape).train()
            work = lambda vae: vae.decode(vae.encode(video).mode())  # noqa: E731
        else:
            module = TextEncoder(TextConfig(text_width=8, text_heads=2, text_layers=3, context_length=16)).train()
            work = lambda text: text(["a red cup", "a ball"])  # noqa: E731
        checkpoint_activations(module, how=mode)
        results.append(kept_by(module, work))
    (many, plain), (few, recomputed) = results
    assert few < (0.9 if how == "cheap" else 0.7) * many
    assert all(torch.equal(p, q) for p, q in zip(plain, recomputed, strict=True))


@pytest.mark.slow
def test_compiled_blocks_compute_the_same() -> None:
    """Gradients too, with dropout, and what is cheap computed again. One block, for each takes half a minute."""
    small = replace(CONFIG, channel_mult=(1,), attention_levels=(False,))
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        unet = UNet3D(small).train()
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        settings = TrainingConfig(gradient_checkpointing="cheap", compile=compiled)
        parallelize({"unet": unet}, lambda batch: {}, settings, passed={"middle": unet.middle[1:]})
        with clip_seeds([1, 2]):
            found.append(gradients(unet, dtype=torch.float32))
    plain, fused = found
    assert plain.keys() == fused.keys()
    assert any(not torch.equal(gradient, fused[name]) for name, gradient in plain.items()), "other kernels ran"
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-3, atol=1e-5)
