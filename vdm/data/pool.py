"""A function of many things, in processes that may hang or die on one of them."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import cv2
import torch

from vdm.errors import UserError

GRACE = 3.0  # seconds between a worker's own alarm and our patience with it

Item = TypeVar("Item")
Result = TypeVar("Result")


class Lost(Exception):
    """What became of a worker."""


class Slow(Lost):
    """It took too long and was ended; other workers have died by themselves."""


class Pool(Generic[Item, Result]):
    """Processes that answer items with `function(item)`; each has up to `ahead` of them waiting in its queue.

    A worker that takes more than `time_limit` seconds for an item (0 is for ever) is Slow, one that dies is Lost, and a
    new one takes its place. Items and results must be picklable, the function need not be: workers are forked. What it
    raises is raised by `result`. Raises UserError on a system that cannot fork.
    """

    def __init__(
        self, function: Callable[[Item], Result], *, num_workers: int, time_limit: float, ahead: int = 1
    ) -> None:
        if "fork" not in multiprocessing.get_all_start_methods():
            raise UserError("this system cannot fork worker processes; set data.dataloader_num_workers=0")
        self._function, self._time_limit, self._ahead = function, time_limit, ahead
        self._workers = [_Worker(function, time_limit) for _ in range(num_workers)]

    @property
    def has_room(self) -> bool:
        """Whether some worker's queue is not full."""
        return any(len(worker.queue) < self._ahead for worker in self._workers)

    @property
    def is_idle(self) -> bool:
        """Whether all that was submitted is answered."""
        return not any(worker.queue for worker in self._workers)

    def submit(self, item: Item) -> None:
        """Give an item to the worker with the fewest."""
        min(self._workers, key=lambda worker: len(worker.queue)).give(item)

    def result(self) -> tuple[Item, Result | Lost]:
        """The next item that is done, and its result; waits for it."""
        while True:
            busy = {worker.pipe: number for number, worker in enumerate(self._workers) if worker.queue}
            for pipe in wait(list(busy), timeout=1.0 if self._time_limit else None):
                assert isinstance(pipe, Connection)
                worker = self._workers[busy[pipe]]
                try:
                    good, value = pipe.recv()
                except (EOFError, ConnectionError):
                    return self._replaced(busy[pipe])
                worker.since = time.monotonic()
                item = worker.queue.popleft()
                if not good:
                    raise value
                return item, value
            for number in busy.values():
                if self._time_limit and self._workers[number].is_stuck(self._time_limit):
                    return self._replaced(number)

    def _replaced(self, number: int) -> tuple[Item, Lost]:
        """What became of a worker that will not answer; another has what it was still to do."""
        worker = self._workers[number]
        item, lost = worker.queue.popleft(), worker.ended(self._time_limit)
        self._workers[number] = _Worker(self._function, self._time_limit)
        for left in worker.queue:
            self._workers[number].give(left)
        return item, lost

    def close(self) -> None:
        """End all workers, now; none outlives this."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()


def run_each(
    function: Callable[[Item], Result], items: Sequence[Item], *, num_workers: int, time_limit: float
) -> Iterator[tuple[int, Result | Lost]]:
    """(index, function(item)) of every item, as they are done; a Lost in place of a result that never came."""
    left = iter(range(len(items)))
    pool: Pool[int, Result] = Pool(
        lambda index: function(items[index]), num_workers=max(1, min(num_workers, len(items))), time_limit=time_limit
    )
    try:
        while True:
            while pool.has_room and (index := next(left, None)) is not None:
                pool.submit(index)
            if pool.is_idle:
                return
            yield pool.result()
    finally:
        pool.close()


_OURS: WeakSet[Connection] = WeakSet()  # this process's ends of all pipes to workers


class _Worker:
    """A process, the pipe to it, and the items that it was given and has not answered, in order."""

    def __init__(self, function: Callable[[Any], Any], time_limit: float) -> None:
        self.queue: deque[Any] = deque()
        self.since = time.monotonic()  # it has been at the first of its queue since then, or later
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        _OURS.add(self.pipe)
        self.process = context.Process(target=_serve, args=(function, theirs, time_limit), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, item: Any) -> None:
        if not self.queue:
            self.since = time.monotonic()
        self.queue.append(item)
        with suppress(OSError):  # where it has died already, `result` will find it
            self.pipe.send(item)

    def is_stuck(self, time_limit: float) -> bool:
        """Whether its own alarm has not ended it: a process that is stopped, or waits for a disk, hears none."""
        return time.monotonic() - self.since > time_limit + GRACE and not self.pipe.poll()

    def ended(self, time_limit: float) -> Lost:
        """Why it stopped answering; if it goes on without that, it is ended now."""
        self.process.join(0 if self.is_stuck(time_limit) else 5)
        stuck = self.process.exitcode is None
        self.process.kill()
        self.process.join(5)
        code = self.process.exitcode
        self.pipe.close()
        if stuck or code == -signal.SIGALRM:
            return Slow(f"its decoder took more than {time_limit:g} seconds and was killed")
        return Lost(f"its decoder died (exit code {code})")


def _serve(function: Callable[[Any], Any], pipe: Connection, time_limit: float) -> None:
    """Answer items until the pipe closes. An alarm that nobody handles ends the process, whatever C code it is in."""
    for inherited in list(_OURS):
        inherited.close()  # else no pipe would close with the process that has started us
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for asked in (signal.SIGTERM, signal.SIGINT):
        signal.signal(asked, signal.SIG_IGN)  # the process that has started us ends us, when it is done with us
    cv2.setNumThreads(0)  # the workers are the parallelism
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):
        while True:
            item = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, time_limit)
            try:
                answer = True, function(item)
            except Exception as error:
                answer = False, error
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(answer)
