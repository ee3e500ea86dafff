"""Clips side by side on a CPU: threads with clips of their own, in place of threads within every operation.

Threads within an operation meet at its end, thousands of times a second, and who is early spins; on a busy machine most
of the time goes there. Threads with clips of their own meet once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from vdm import dist


def side_by_side(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What computes the same as `call`, on a CPU without gradients with the clips shared out among threads.

    The first argument has a row for each of B clips; the others, and the result, have k*B: those of all clips for one
    text, then those for the next. What `call` makes of a clip must not depend on the others. Of PyTorch's threads as
    many get clips as divide both numbers; the others help them.
    """

    def shared_out(*tensors: Tensor) -> Tensor:
        clips, threads = len(tensors[0]), torch.get_num_threads()
        groups = math.gcd(clips, threads)
        if groups == 1 or not clips or tensors[0].device.type != "cpu" or _depends_on_the_thread():
            return call(*tensors)
        each = [tensor.unflatten(0, (-1, clips)).tensor_split(groups, dim=1) for tensor in tensors]
        ready = Barrier(groups + 1)

        def begin() -> None:
            torch.set_num_threads(threads // groups)
            torch.get_num_threads()  # a thread takes over what was set last when it first asks, and keeps it
            ready.wait()

        with ThreadPoolExecutor(groups, initializer=begin) as pool:
            try:
                parts = pool.map(lambda *some: _without_gradients(call, *some), *each)
            except RuntimeError:  # no thread could be started, and those that were must not wait for it
                ready.abort()
                torch.set_num_threads(threads)
                raise
            ready.wait()
            torch.set_num_threads(threads)  # which threads that come later begin with, for the last to set it counts
            return torch.cat([part.unflatten(0, (-1, clips // groups)) for part in parts], dim=1).flatten(0, 1)

    return shared_out


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
