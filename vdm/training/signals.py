"""SIGTERM and SIGINT end a run after the step that it is at, with a checkpoint."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

from vdm import dist

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within the context the first of these signals is noted in `name`, and a second one interrupts at once.

    Outside the main thread, where Python lets nobody listen, signals do what they did.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if dist.is_main():
            print(
                f"\n{self.name}: the run ends with a checkpoint after this step; once more ends it now", file=sys.stderr
            )
