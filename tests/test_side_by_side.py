"""Clips in threads of their own come out as they would one after the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vdm.side_by_side import alone, side_by_side


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@settings(deadline=None, max_examples=30)
@given(clips=st.integers(1, 9), texts=st.integers(1, 3))
def test_rows_keep_their_places(clips: int, texts: int) -> None:
    x, scale = torch.randn(clips, 3), torch.randn(texts * clips, 1)

    def call(x: Tensor, scale: Tensor) -> Tensor:
        return x.repeat(len(scale) // len(x), 1) * scale

    with torch.no_grad():
        assert torch.equal(side_by_side(call)(x, scale), call(x, scale))


@pytest.mark.parametrize(("clips", "calls", "each"), [(4, 4, 1), (2, 2, 2), (6, 2, 2), (3, 1, 4), (1, 1, 4)])
def test_threads_are_shared_out(clips: int, calls: int, each: int) -> None:
    seen, later = [], []

    def call(x: Tensor) -> Tensor:
        seen.append((threading.get_ident(), len(x), torch.get_num_threads(), torch.is_grad_enabled()))
        other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        other.start()
        other.join()
        return x

    with torch.no_grad():
        side_by_side(call)(torch.zeros(clips, 1))
    assert [entry[1:] for entry in seen] == [(clips // calls, each, False)] * calls
    assert (threading.get_ident() in {entry[0] for entry in seen}) == (calls == 1)
    assert torch.get_num_threads() == 4
    assert set(later) == {4}, "a thread that comes later has all of them"


def test_threads_are_kept_from_call_to_call_and_end_with_what_has_them() -> None:
    seen: set[threading.Thread] = set()

    def call(x: Tensor) -> Tensor:
        seen.add(threading.current_thread())
        return x

    shared_out = side_by_side(call)
    with torch.no_grad():
        for _ in range(5):
            shared_out(torch.zeros(4, 1))
    assert len(seen) <= 4 and all(thread.is_alive() for thread in seen)
    del shared_out
    for thread in seen:
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.mark.parametrize(("clips", "between", "each"), [(4, 1, 1), (2, 1, 2), (3, 4, 4)])
def test_between_calls_that_are_shared_out_one_thread_computes(clips: int, between: int, each: int) -> None:
    seen, x = set(), torch.zeros(clips, 1)

    def call(x: Tensor) -> Tensor:
        seen.add(torch.get_num_threads())
        return x

    with torch.no_grad():
        shared_out = side_by_side(call)
        with pytest.raises(KeyError), alone(x):
            shared_out(x)
            assert torch.get_num_threads() == between
            raise KeyError
    assert seen == {each} and torch.get_num_threads() == 4


def test_a_thread_that_cannot_be_started_is_an_error_and_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def only_one(self: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", only_one)
    with torch.no_grad(), pytest.raises(RuntimeError, match="can't start new thread"):
        side_by_side(lambda x: x)(torch.zeros(4, 1))


def test_what_a_thread_would_not_know_of_stays_in_one() -> None:
    weight = torch.ones(3, 3, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return x @ weight

    x = torch.randn(4, 3)
    side_by_side(call)(x).sum().backward()
    assert weight.grad is not None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        side_by_side(call)(x)
    assert counter.get_total_flops() == 2 * 4 * 3 * 3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert side_by_side(call)(x).dtype == torch.bfloat16
    with torch.inference_mode():
        assert side_by_side(call)(x).is_inference()
    with torch.no_grad(), torch.device("meta"):
        assert side_by_side(lambda x: torch.empty(len(x)))(x).is_meta
    with torch.no_grad():
        assert side_by_side(call)(x[:0]).shape == (0, 3)


def test_an_error_arrives() -> None:
    def call(x: Tensor) -> Tensor:
        raise ValueError("no such clip")

    with torch.no_grad(), pytest.raises(ValueError, match="no such clip"):
        side_by_side(call)(torch.zeros(4, 1))
    assert torch.get_num_threads() == 4
