"""Muon: orthogonal updates for matrices, AdamW for the rest, and a state that survives a restart."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vdm.training.muon import ADAMW_RMS, Muon, orthogonalize
from vdm.training.optim import build_optimizer
from vdm.training.settings import TrainingConfig

CONFIG = TrainingConfig(optimizer="muon", learning_rate=0.01, adam_beta1=0.9, adam_beta2=0.99, weight_decay=0.1)


class Net(nn.Module):
    """One parameter of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.place = nn.Parameter(torch.randn(3, 6))
        self.linear = nn.Linear(6, 4, bias=False)
        self.twin = nn.Linear(6, 4)
        self.conv = nn.Conv2d(4, 5, 3)
        self.norm = nn.LayerNorm(5)

    def gradients(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.grad = torch.randn(p.shape, generator=draw)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 3), st.integers(0, 10_000))
def test_singular_values_come_near_one_and_singular_vectors_stay(rows: int, columns: int, n: int, seed: int) -> None:
    x = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    within = u.transpose(1, 2) @ orthogonalize(x) @ v.transpose(1, 2)
    values = within.diagonal(dim1=1, dim2=2)
    assert (within - torch.diag_embed(values)).abs().max() < 1e-8
    assert values.max() < 1.3
    large = s / s.norm(dim=1, keepdim=True) > 0.03  # what is far smaller takes more rounds
    assert (values[large] > 0.6).all()


def test_in_bfloat16_matrices_become_as_orthogonal() -> None:
    x = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0))
    exact, quick = orthogonalize(x), orthogonalize(x, within=torch.bfloat16)
    assert quick.dtype is torch.float32 and not torch.equal(exact, quick)
    values = torch.linalg.svdvals(quick)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (quick - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("precision", "within"), [("no", None), ("fp16", None), ("bf16", torch.bfloat16)])
def test_matrices_are_computed_in_bfloat16_where_the_model_is(precision: str, within: torch.dtype | None) -> None:
    plain, other = net(), net()
    for model, name in ((plain, "no"), (other, precision)):
        settings: dict[str, Any] = {"optimizer": "muon", "mixed_precision": name}
        model.gradients(0)
        build_optimizer({"unet": model}, TrainingConfig(**settings)).step()
    assert torch.equal(plain.conv.weight, other.conv.weight) is (within is None)
    torch.testing.assert_close(plain.conv.weight, other.conv.weight, rtol=0.0, atol=1e-5)
    assert torch.equal(plain.table.weight, other.table.weight)


def test_a_gradient_of_zeros_moves_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_weights_of_layers_are_matrices_and_nothing_else_is() -> None:
    model = net()
    matrices, others = build_optimizer({"unet": model}, CONFIG).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in matrices["params"]} == {"linear.weight", "twin.weight", "conv.weight"}
    assert {names[id(p)] for p in others["params"]} == set(names.values()) - {names[id(p)] for p in matrices["params"]}


def test_what_is_frozen_is_left_out() -> None:
    model = net().requires_grad_(False)
    model.norm.requires_grad_(True)
    (group,) = build_optimizer({"unet": model}, CONFIG).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.norm.parameters()]


def test_one_step_of_a_matrix_by_hand() -> None:
    """Nesterov's momentum, then an orthogonal matrix of AdamW's size; equal shapes do not disturb each other."""
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.gradients(1)
    build_optimizer({"unet": model}, CONFIG).step()
    for name in ("linear.weight", "twin.weight", "conv.weight"):
        p = model.get_parameter(name)
        assert p.grad is not None
        update = 0.1 * p.grad + 0.9 * (0.1 * p.grad)  # of which only the direction counts
        step = orthogonalize(update.flatten(1)[None])[0].reshape(p.shape)
        expected = before[name] * (1 - 0.01 * 0.1) - 0.01 * ADAMW_RMS * max(p.flatten(1).shape) ** 0.5 * step
        torch.testing.assert_close(p.detach(), expected)


def test_the_rest_is_adamw() -> None:
    ours, theirs = net(), net()
    muon = build_optimizer({"unet": ours}, CONFIG)
    rest = [p for name, p in theirs.named_parameters() if name not in ("linear.weight", "twin.weight", "conv.weight")]
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.99), eps=CONFIG.epsilon, weight_decay=0.1)
    for seed in range(3):
        ours.gradients(seed)
        theirs.gradients(seed)
        muon.step()
        adamw.step()
    for name in ("table.weight", "place", "twin.bias", "norm.weight"):
        torch.testing.assert_close(ours.get_parameter(name), theirs.get_parameter(name))


def test_a_group_without_gradients_stays_as_it_is() -> None:
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.gradients(0)
    for name in ("linear.weight", "twin.weight", "conv.weight"):
        model.get_parameter(name).grad = None
    build_optimizer({"unet": model}, CONFIG).step()
    assert torch.equal(before["conv.weight"], model.conv.weight) and not torch.equal(before["place"], model.place)


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    whole, first = net(), net()
    one, two = build_optimizer({"unet": whole}, CONFIG), build_optimizer({"unet": first}, CONFIG)
    for seed in range(2):
        for model, optimizer in ((whole, one), (first, two)):
            model.gradients(seed)
            optimizer.step()
    second = net(seed=5)
    second.load_state_dict(first.state_dict())
    three = build_optimizer({"unet": second}, CONFIG)
    three.load_state_dict(two.state_dict())
    for model, optimizer in ((whole, one), (second, three)):
        model.gradients(7)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_weak_direction_is_learned_as_fast_as_a_strong_one() -> None:
    """The reason to have it: deep linear regression, where one direction of the input is a tenth as strong."""
    torch.manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4))
    x = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.1])) @ rotation
    weak, distance = rotation[3], {}
    for optimizer in ("muon", "adamw"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        config = TrainingConfig(optimizer=optimizer, learning_rate=0.01, weight_decay=0.0)  # type: ignore[arg-type]
        step = build_optimizer({"unet": model}, config)
        for _ in range(300):
            step.zero_grad()
            (model(x) - x).square().sum().backward()
            step.step()
        distance[optimizer] = float((model(weak) - weak).detach().norm())
    assert distance["muon"] < 0.8 * distance["adamw"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_both_learn(optimizer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 1))
    step = build_optimizer({"unet": model}, TrainingConfig(optimizer=optimizer, learning_rate=0.01))  # type: ignore[arg-type]
    x = torch.randn(64, 8)
    y, losses = x[:, :1] * x[:, 1:2], []
    for _ in range(200):
        step.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        step.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    assert sum(a < b for a, b in pairwise(losses)) < 100


def test_the_class_needs_no_config() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = Muon([{"params": [weight], "matrices": True}], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    weight.grad = torch.ones(2, 3)
    optimizer.step()
    assert weight.max() < 1.0
