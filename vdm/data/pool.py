"""A function of each of many files, in several processes that may hang or die on one of them."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Lost(Exception):
    """What became of a worker: it died, or was killed for taking too long."""


def run_each(
    function: Callable[[Item], Result], items: Sequence[Item], *, num_workers: int, time_limit: float
) -> Iterator[tuple[int, Result | Lost]]:
    """(index, function(item)) of every item, as they are done; a Lost in place of a result that never came.

    `function` must be importable, and return or raise nothing that cannot be pickled; what it raises is raised here. A
    worker that takes more than `time_limit` seconds for an item is killed, and the others go on.
    """
    waiting = list(reversed(range(len(items))))
    workers = [_Worker(function) for _ in range(max(1, min(num_workers, len(items))))]
    try:
        while waiting or any(worker.index is not None for worker in workers):
            for worker in workers:
                if worker.index is None and waiting:
                    worker.start(waiting.pop(), items)
            for number, worker in enumerate(workers):
                if worker.index is None:
                    continue
                done = worker.result(time_limit)
                if done is not None:
                    yield worker.index, done
                    if isinstance(done, Lost):
                        workers[number] = _Worker(function)
                    else:
                        worker.index = None
            busy = [worker.pipe for worker in workers if worker.index is not None]
            wait(busy, timeout=0.1)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


class _Worker:
    """A process that waits for items, and what it is at."""

    def __init__(self, function: Callable[[Any], Any]):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.index: int | None = None
        self.since = 0.0

    def start(self, index: int, items: Sequence[Any]) -> None:
        self.index, self.since = index, time.monotonic()
        with suppress(OSError):  # where it has died already, `result` will find it
            self.pipe.send(items[index])

    def result(self, time_limit: float) -> Any:
        """What it answered; a Lost if it never will; None as long as that is open."""
        try:
            if self.pipe.poll():
                good, value = self.pipe.recv()
                if good:
                    return value
                raise value
        except (EOFError, ConnectionError):
            self.process.join(5)
            return Lost(f"its decoder died (exit code {self.process.exitcode})")
        if time.monotonic() - self.since < time_limit:
            return None
        self.process.kill()
        return Lost(f"its decoder took more than {time_limit:g} seconds and was killed")


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    while True:
        try:
            item = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            pipe.send((True, function(item)))
        except KeyboardInterrupt:
            return
        except Exception as error:
            pipe.send((False, error))
