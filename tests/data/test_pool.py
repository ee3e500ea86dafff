"""Workers that hang, die or raise, and the others that go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vdm.data import pool
from vdm.data.pool import Lost, run_each


def work(item: object) -> object:
    if item == "hang":
        time.sleep(60)
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "raise":
        raise ValueError("no")
    return ("done", item)


@pytest.mark.parametrize("num_workers", [1, 3, 50])
def test_every_item_is_answered_once(num_workers: int) -> None:
    items = list(range(20))
    found = dict(run_each(work, items, num_workers=num_workers, time_limit=30))
    assert found == {i: ("done", i) for i in items}
    assert dict(run_each(work, [], num_workers=num_workers, time_limit=1)) == {}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_hang_and_a_death_cost_one_item_each(num_workers: int) -> None:
    items = ["a", "hang", "b", "die", "c"]
    began = time.monotonic()
    found = dict(run_each(work, items, num_workers=num_workers, time_limit=1.0))
    assert time.monotonic() - began < 20
    assert {i for i, result in found.items() if isinstance(result, Lost)} == {1, 3}
    assert str(found[1]) == "its decoder took more than 1 seconds and was killed"
    assert "its decoder died (exit code -9)" in str(found[3])
    assert [found[i] for i in (0, 2, 4)] == [("done", item) for item in "abc"]


def test_what_an_item_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="no"):
        list(run_each(work, ["raise"], num_workers=1, time_limit=5))


def stop(item: object) -> object:
    if item == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    return item


def test_a_stopped_process_hears_no_alarm_and_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "GRACE", 0.5)
    found = dict(run_each(stop, ["stop", "a", "b"], num_workers=1, time_limit=0.5))
    assert str(found[0]) == "its decoder took more than 0.5 seconds and was killed"
    assert (found[1], found[2]) == ("a", "b")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_the_process_that_started_it(number: signal.Signals) -> None:
    script = """
import os, time
from vdm.data.pool import Pool
pool = Pool(time.sleep, num_workers=3, time_limit=60)
pool.submit(0.5)
print(*(worker.process.pid for worker in pool._workers), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = process.stdout.readline().split()
        process.send_signal(number)
    assert len(workers) == 3
    deadline = time.monotonic() + 20
    while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
