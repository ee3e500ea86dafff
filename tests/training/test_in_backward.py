"""The optimizer in the backward pass: the same steps, clipped by the norm before; gradients that are gone at once."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.memory import LiveBytes
from vdm.training.adam import AdamW
from vdm.training.in_backward import InBackward

RATE = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
LARGE = 1e9


def network(*, width: int = 4, depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)))


def loss_of(net: nn.Module, step: int, *, width: int = 4) -> Tensor:
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(step))
    return (1 + step) * (net(x) - x.roll(1, dims=1)).square().mean()


def fused(net: nn.Module, *, max_grad_norm: float = LARGE) -> InBackward:
    return InBackward(AdamW(net.parameters(), **RATE), max_grad_norm=max_grad_norm)


def reference(net: nn.Module, *, steps: int, max_grad_norm: float) -> list[float]:
    """AdamW after the backward pass, its gradients scaled by the norm of the step before; returns all norms."""
    optimizer = torch.optim.AdamW(net.parameters(), **RATE)
    norms: list[float] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        scale = min(1.0, max_grad_norm / (norms[-1] + 1e-6)) if norms else 1.0
        norms.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in net.parameters())))
        for p in net.parameters():
            p.grad *= scale
        optimizer.step()
    return norms


@pytest.mark.parametrize("limit", [LARGE, 0.3])
def test_it_is_adamw_clipped_by_the_norm_of_the_step_before(limit: float) -> None:
    ours, theirs = network(), network()
    optimizer = fused(ours, max_grad_norm=limit)
    norms = []
    for step in range(6):
        with optimizer.armed():
            loss_of(ours, step).backward()
        norms.append(optimizer.norm)
        assert all(p.grad is None for p in ours.parameters())
    expected = reference(theirs, steps=6, max_grad_norm=limit)
    assert norms == pytest.approx(expected, rel=1e-4)
    assert max(norms[:-1]) > 0.3, "some step is clipped"
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    net = network()
    optimizer = fused(net)
    with optimizer.armed():
        loss_of(net, 0).backward()
    before, last = [p.detach().clone() for p in net.parameters()], optimizer.last_norm
    handle = net[0][0].weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), math.nan))
    with optimizer.armed():
        loss_of(net, 1).backward()
    handle.remove()
    assert math.isnan(optimizer.norm) and optimizer.last_norm == last
    moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
    assert moved == [False, *[True] * 5], "that weight alone stays"
    assert all(int(optimizer.optimizer.state[p]["step"]) == 1 + m for p, m in zip(net.parameters(), moved, strict=True))


def test_outside_its_steps_a_backward_pass_does_what_it_always_does() -> None:
    net = network()
    optimizer = fused(net)
    before = [p.detach().clone() for p in net.parameters()]
    loss_of(net, 0).backward()
    assert all(p.grad is not None and torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    net.zero_grad()
    with pytest.raises(RuntimeError, match="amid"), optimizer.armed():
        raise RuntimeError("amid")
    loss_of(net, 0).backward()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_its_state_is_the_norm() -> None:
    ours, other = fused(network()), fused(network())
    with ours.armed():
        loss_of(network(), 0).backward()
    assert ours.norm == 0.0, "of another network"
    ours.last_norm = 3.0
    other.load_state_dict(ours.state_dict())
    assert other.last_norm == 3.0 and other.scale == ours.scale


def peak_of_backward(net: nn.Module, optimizer: InBackward | None, *, width: int) -> int:
    loss = loss_of(net, 0, width=width)
    with LiveBytes() as live:
        if optimizer is None:
            loss.backward()
        else:
            with optimizer.armed():
                loss.backward()
    return live.peak


def test_no_two_layers_gradients_are_there_at_a_time() -> None:
    width, depth = 128, 12
    layer = width * width * 4  # bytes
    plain = peak_of_backward(network(width=width, depth=depth), None, width=width)
    assert plain > depth * layer
    net = network(width=width, depth=depth)
    optimizer = fused(net)
    with optimizer.armed():
        loss_of(net, 0, width=width).backward()  # makes the moments
    freed = peak_of_backward(net, optimizer, width=width)
    assert freed < 0.5 * plain
    deeper = network(width=width, depth=2 * depth)
    optimizer = fused(deeper)
    with optimizer.armed():
        loss_of(deeper, 0, width=width).backward()
    assert peak_of_backward(deeper, optimizer, width=width) < freed + 2 * layer, "it does not grow with the depth"
