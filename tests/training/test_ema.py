"""Averaged weights: the formula, and that looking through them leaves no trace."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.memory import LiveBytes
from vdm.training.ema import EMA


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def stir(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)


@given(decay=st.floats(0.0, 0.99999), count=st.integers(1, 40))
def test_the_average_is_the_formula_in_float64(decay: float, count: int) -> None:
    weight = nn.Linear(2, 2, bias=False)
    ema = EMA({"net": weight}, decay=decay)
    expected = weight.weight.detach().double()
    for n in range(1, count + 1):
        stir(weight, n)
        ema.update()
        rate = min(decay, (1 + n) / (10 + n))
        expected = rate * expected + (1 - rate) * weight.weight.detach().double()
    assert ema.num_updates == count
    torch.testing.assert_close(ema.shadow["net"]["weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_decay_zero_is_the_weights_themselves() -> None:
    net = network()
    ema = EMA({"net": net}, decay=0.0)
    for seed in range(3):
        stir(net, seed)
        ema.update()
    assert_equal(dict(ema.state_dict("net")), state_of(net))


def test_the_average_is_kept_in_float32() -> None:
    net = nn.Linear(2, 2).bfloat16()
    ema = EMA({"net": net}, decay=0.999)
    with torch.no_grad():
        net.weight += 1.0
    before = ema.shadow["net"]["weight"].clone()
    for _ in range(3):
        ema.update()
    assert ema.shadow["net"]["weight"].dtype == torch.float32
    assert (ema.shadow["net"]["weight"] > before).all()


def test_applied_puts_the_averages_in_and_everything_back() -> None:
    net, frozen = network().train(), nn.Linear(2, 2)
    ema = EMA({"net": net}, decay=0.9)
    stir(net, 1)
    ema.update()
    own, outside = state_of(net), state_of(frozen)
    with ema.applied():
        assert not any(module.training for module in net.modules())
        assert_equal(state_of(net), dict(ema.state_dict("net")))
        assert any(not torch.equal(tensor, own[name]) for name, tensor in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert_equal(state_of(net), own)
    assert_equal(state_of(frozen), outside)
    with ema.applied():
        pass
    assert_equal(state_of(net), own)


def test_applied_restores_after_an_error_too() -> None:
    net = network().eval()
    ema = EMA({"net": net}, decay=0.9)
    stir(net, 1)
    own = state_of(net)
    with pytest.raises(RuntimeError, match="in the middle"), ema.applied():
        raise RuntimeError("in the middle")
    assert_equal(state_of(net), own)
    assert not net.training


def test_buffers_follow_the_module() -> None:
    net = network().train()
    ema = EMA({"net": net}, decay=0.9)
    net(torch.ones(4, 3))
    assert torch.equal(ema.state_dict("net")["1.running_mean"], net.state_dict()["1.running_mean"])
    assert int(ema.state_dict("net")["1.num_batches_tracked"]) == 1


def test_a_loaded_average_goes_on_bit_for_bit() -> None:
    net = network()
    ema, other = EMA({"net": net}, decay=0.9), EMA({"net": net}, decay=0.9)
    stir(net, 1)
    ema.update()
    stored = {name: tensor.clone() for name, tensor in ema.state_dict("net").items()}
    other.load({"net": stored}, num_updates=ema.num_updates)
    for seed in (2, 3):
        stir(net, seed)
        ema.update()
        other.update()
    assert_equal(ema.shadow["net"], other.shadow["net"])
    assert not torch.equal(ema.shadow["net"]["0.weight"], stored["0.weight"])


# ---- averages in the memory of the CPU, and weights in bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_averages_are_the_same_numbers(dtype: torch.dtype) -> None:
    net, twin = network().to(dtype), network().to(dtype)
    here, there = EMA({"net": net}, decay=0.9), EMA({"net": twin}, decay=0.9, offload=True)
    for seed in range(1, 6):
        for module, ema in ((net, here), (twin, there)):
            stir(module, seed)
            ema.update()
        if seed == 3:
            with there.applied():
                assert_equal(
                    state_of(twin), {n: t.to(twin.state_dict()[n]) for n, t in there.state_dict("net").items()}
                )
    assert_equal(dict(here.state_dict("net")), dict(there.state_dict("net")))
    assert all(average.device.type == "cpu" for average in there.shadow["net"].values())


def test_an_offloaded_average_is_of_the_weights_as_they_were() -> None:
    net = nn.Linear(300, 300)
    ema = EMA({"net": net}, decay=0.0, offload=True)
    for seed in range(20):
        stir(net, seed)
        expected = net.weight.detach().clone()
        ema.update()
        with torch.no_grad():
            net.weight += 100.0  # the next step, while the averages are on their way
        assert torch.equal(ema.state_dict("net")["weight"], expected)


def test_an_error_of_the_worker_is_not_lost() -> None:
    net = nn.Linear(3, 3)
    ema = EMA({"net": net}, decay=0.9, offload=True)
    ema.shadow["net"]["weight"] = torch.zeros(7)
    ema.update()
    with pytest.raises(RuntimeError, match="size"):
        ema.wait()


def test_weights_in_bfloat16_come_back_and_their_averages_stay_in_float32() -> None:
    net = network().bfloat16()
    ema = EMA({"net": net}, decay=0.9)
    stir(net, 1)
    ema.update()
    own, averages = state_of(net), {name: average.clone() for name, average in ema.shadow["net"].items()}
    with ema.applied():
        for name, p in net.named_parameters():
            assert torch.equal(p, averages[name].bfloat16())
            assert torch.equal(ema.state_dict("net")[name], averages[name])
    assert_equal(state_of(net), own)
    assert_equal(ema.shadow["net"], averages)


def test_applied_makes_no_second_copy() -> None:
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(20)))
    ema = EMA({"net": net}, decay=0.9)
    whole = sum(p.numel() * 4 for p in net.parameters())
    with LiveBytes() as live, ema.applied():
        pass
    assert 0 < live.peak < 0.2 * whole
