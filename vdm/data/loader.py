"""Batches of a stream of clips, read by worker processes, each of which may hang or die and cost but the clip it is at.

Pixels travel through memory that the workers share with the training process, which then need not be copied between
them, nor be in /dev/shm, of which a container has little.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vdm.data.dataset import ClipDataset, Sample
from vdm.data.pool import Lost, Pool, Slow
from vdm.data.quarantine import Bad


@dataclass(frozen=True)
class Batch:
    """Clips of one length, side by side."""

    video: Tensor  # uint8 (B,3,T,H,W), or what a latent cache holds
    captions: list[str]
    ids: list[str]
    indices: list[int]
    positions: list[int]
    bad: Bad

    def pin_memory(self) -> Batch:
        return replace(self, video=self.video.pin_memory())


def batches(
    dataset: ClipDataset,
    *,
    batch_size: int,
    start_batch: int = 0,
    num_batches: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    num_ranks: int = 1,
) -> Generator[Batch, None, None]:
    """Batches start_batch, start_batch + 1, ... of the stream: without end for training, one pass for validation.

    Entering at batch k gives what skipping k batches gives, with any number of workers. Of several processes the one of
    `rank` gets every `num_ranks`-th batch, so that together they see the same stream; `num_batches` counts its own. A
    training batch must not straddle two global ones: `batch_size` divides the dataset's.

    With workers, a clip whose decoder takes more than `data.decode_timeout` seconds is given up, as is one that a
    worker twice dies of; without, nothing can end a decoder that hangs. Raises UserError where no clip can be used.
    """
    training = dataset.split == "train"
    assert not training or dataset.batch_size % batch_size == 0, "a batch must lie inside one global batch"
    numbers = itertools.islice(itertools.count(start_batch + rank, num_ranks), num_batches)
    spans = _spans(batch_size, numbers, None if training else len(dataset))
    if num_workers:
        lists = _Reader(dataset, num_workers=num_workers, window=2 * (batch_size + num_workers)).read(spans)
    else:
        lists = ([dataset[position] for position in span] for span in spans)
    pins = pin_memory and torch.cuda.is_available()
    try:
        for samples in lists:
            batch = _collate(samples)
            yield batch.pin_memory() if pins else batch
    finally:
        lists.close()  # ends the workers now, not when the garbage is collected


def _spans(batch_size: int, numbers: Iterable[int], stop: int | None) -> Iterator[range]:
    """The positions of batches by their numbers; `stop` None never ends. The last batch may be smaller."""
    for number in numbers:
        first = number * batch_size
        last = first + batch_size if stop is None else min(first + batch_size, stop)
        if first >= last:
            return
        yield range(first, last)


def _collate(samples: list[Sample]) -> Batch:
    return Batch(
        video=_stacked([sample["video"] for sample in samples]),
        captions=[sample["caption"] for sample in samples],
        ids=[sample["id"] for sample in samples],
        indices=[sample["index"] for sample in samples],
        positions=[sample["position"] for sample in samples],
        bad=[pair for sample in samples for pair in sample["bad"]],
    )


def _stacked(videos: list[Tensor]) -> Tensor:
    """Tensors (...) as one (B, ...) in the order of memory that they have, so that nothing is transposed."""
    order = sorted(range(videos[0].ndim), key=videos[0].stride, reverse=True)
    back = [1 + order.index(dim) for dim in range(len(order))]
    return torch.stack([video.permute(order) for video in videos]).permute(0, *back)


# --- workers ---

Place = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]  # dtype, shape and strides of a tensor in a slot


@dataclass(frozen=True)
class _Task:
    """What a worker is asked: the clip to try at a position, and where to leave it."""

    position: int
    index: int
    slot: int


@dataclass
class _Search:
    """For the sample of a position: which clips are still to be tried, and which were in vain."""

    slot: int
    candidates: deque[int]
    bad: Bad = field(default_factory=list)
    deaths: int = 0  # of workers, of the clip that is being tried


class _Slots:
    """Memory for samples that processes share which are forked from this one."""

    def __init__(self, count: int, num_bytes: int) -> None:
        self._size = max(1, -(-num_bytes // mmap.PAGESIZE)) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, count * self._size)  # anonymous: not in /dev/shm
        self.free = deque(range(count))

    def put(self, slot: int, tensor: Tensor) -> Place:
        """Copy a dense tensor there; returns what `get` wants to know."""
        place: Place = tensor.dtype, tuple(tensor.shape), tensor.stride()
        self.get(slot, *place).copy_(tensor)
        return place

    def get(self, slot: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        flat = torch.frombuffer(self._memory, dtype=dtype, count=math.prod(shape), offset=slot * self._size)
        return flat.as_strided(shape, stride)


class _Reader:
    """Samples in the order of their positions from workers that take the clips as they come."""

    def __init__(self, dataset: ClipDataset, *, num_workers: int, window: int) -> None:
        self.dataset = dataset
        self.slots = _Slots(window, dataset.sample_bytes)  # before the workers are forked, which share it
        self.searches: dict[int, _Search] = {}
        self.done: dict[int, Sample] = {}
        self.pool: Pool[_Task, Any] = Pool(
            self._answer, num_workers=num_workers, time_limit=dataset.config.decode_timeout
        )

    def read(self, spans: Iterable[range]) -> Generator[list[Sample], None, None]:
        """The samples of each span; those of one are valid until the next is asked for."""
        spans, ahead = itertools.tee(spans)
        coming = itertools.chain.from_iterable(ahead)
        try:
            for span in spans:
                while True:
                    while self.slots.free and (position := next(coming, None)) is not None:
                        candidates = deque(self.dataset.candidates(position))
                        self.searches[position] = _Search(self.slots.free.popleft(), candidates)
                        self._try_next(position)
                    if all(position in self.done for position in span):
                        break
                    self._receive()
                yield [self.done.pop(position) for position in span]
                self.slots.free.extend(self.searches.pop(position).slot for position in span)
        finally:
            self.pool.close()

    def _answer(self, task: _Task) -> tuple[Sample, Place] | Bad:
        """In a worker: the sample, its pixels in the task's slot; or why there is none."""
        found = self.dataset.attempt(task.position, task.index)
        if isinstance(found, list):
            return found
        place = self.slots.put(task.slot, found["video"])
        found["video"] = torch.empty(0)
        return found, place

    def _try_next(self, position: int) -> None:
        search, given_up = self.searches[position], self.dataset.given_up
        while search.candidates and search.candidates[0] in given_up:
            index = search.candidates.popleft()
            search.bad.append((self.dataset.source.id(index), given_up[index]))
        if not search.candidates:
            raise self.dataset.exhausted(position, search.bad)
        self.pool.submit(_Task(position, search.candidates[0], search.slot))

    def _receive(self) -> None:
        task, result = self.pool.result()
        search = self.searches[task.position]
        if isinstance(result, Lost):
            search.deaths += 1
            if isinstance(result, Slow) or search.deaths > 1:  # the first may be for want of memory
                self.dataset.given_up[task.index] = str(result)
                search.deaths = 0
            self._try_next(task.position)
        elif isinstance(result, list):
            search.bad += result
            search.candidates.popleft()
            search.deaths = 0
            self._try_next(task.position)
        else:
            sample, place = result
            sample["video"], sample["bad"] = self.slots.get(task.slot, *place), search.bad
            self.done[task.position] = sample
