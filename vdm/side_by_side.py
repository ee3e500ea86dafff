"""Clips side by side on a CPU: threads with clips of their own, in place of threads within every operation.

Threads within an operation meet at its end, thousands of times a second, and who is early spins; on a busy machine most
of the time goes there. Threads with clips of their own meet once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from threading import Barrier

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from vdm import dist


def side_by_side(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What computes the same as `call`, on a CPU without gradients with the clips shared out among threads.

    The first argument has a row for each of B clips; the others, and the result, have k*B: those of all clips for one
    text, then those for the next. What `call` makes of a clip must not depend on the others. Of PyTorch's threads, as
    they are now, as many get clips as divide both numbers; the others help them. They are kept from call to call.
    """
    pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
    threads = torch.get_num_threads()

    def shared_out(*tensors: Tensor) -> Tensor:
        clips = len(tensors[0])
        groups = _groups(tensors[0], threads)
        if groups == 1:
            return call(*tensors)
        if (groups, threads) not in pools:
            pools[groups, threads] = _threads(groups, threads // groups)
        each = [tensor.unflatten(0, (-1, clips)).tensor_split(groups, dim=1) for tensor in tensors]
        of_group = partial(pools[groups, threads].submit, _without_gradients, call)
        futures = [of_group(*some) for some in zip(*each, strict=True)]
        wait(futures)  # all, even if one fails: what they read may not be there afterwards
        parts = [future.result().unflatten(0, (-1, clips // groups)) for future in futures]
        return torch.cat(parts, dim=1).flatten(0, 1)

    return shared_out


@contextmanager
def alone(tensor: Tensor) -> Iterator[None]:
    """Meanwhile this thread has no other help it, if rows of `tensor` are shared out by what is made before.

    What is done between two calls is little, and threads that help with it spin for milliseconds after it, on the cores
    where clips are computed by then.
    """
    threads = torch.get_num_threads()
    if shared := _groups(tensor, threads) > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if shared:
            torch.set_num_threads(threads)


def _groups(clips: Tensor, threads: int) -> int:
    """Among how many threads clips are shared out."""
    groups = math.gcd(len(clips), threads)
    return 1 if not len(clips) or clips.device.type != "cpu" or _depends_on_the_thread() else groups


def _threads(count: int, each: int) -> ThreadPoolExecutor:
    """So many threads, each with so many of PyTorch's. (oneDNN and MKL prepare for every thread anew what they do.)"""
    ready, before = Barrier(count + 1), torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(each)
        torch.get_num_threads()  # a thread takes over what was set last when it first asks, and keeps it
        ready.wait()

    pool = ThreadPoolExecutor(count, initializer=begin)
    try:
        for _ in range(count):
            pool.submit(torch.get_num_threads)  # none is idle yet, so each starts one more
        ready.wait()
    except RuntimeError:  # no thread could be started, and those that were must not wait for it
        ready.abort()
        raise
    finally:
        torch.set_num_threads(before)  # which threads that come later begin with, for the last to set it counts
    return pool


def _depends_on_the_thread() -> bool:
    """Whether something is in force here that would not be in another thread, or that counts on the order of calls."""
    return (
        torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled("cpu")
        or _get_current_dispatch_mode() is not None
        or _get_current_function_mode() is not None
        or dist.size() > 1
    )


def _without_gradients(call: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    with torch.no_grad():
        return call(*(tensor.flatten(0, 1) for tensor in tensors))
