"""When a run ends, by steps, epochs or hours, and how much of it is done."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from vdm.training.settings import TrainingConfig


@dataclass(frozen=True)
class Limits:
    """Whichever comes first ends the run."""

    steps: int
    seconds: float = math.inf  # of training, over all restarts

    @staticmethod
    def of(config: TrainingConfig, *, num_clips: int, clips_per_step: int) -> Limits:
        """Those of a config. Epochs are of the training clips, and end with the step that reads the last of them."""
        steps = config.max_train_steps
        if config.max_train_epochs is not None:
            exact = config.max_train_epochs * num_clips / clips_per_step
            steps = min(steps, max(1, math.ceil(exact - 1e-9)))  # 0.1 x 30 / 3 is 1, but for rounding
        hours = config.max_train_hours
        return Limits(steps, math.inf if hours is None else 3600.0 * hours)

    def reached(self, step: int, *, seconds: float) -> bool:
        """Whether the run is over after so many steps and seconds."""
        return step >= self.steps or seconds >= self.seconds

    def expected(self, step: int, *, seconds: float) -> int:
        """How many steps the run will have, if it goes on at the pace of these steps and seconds."""
        if not math.isfinite(self.seconds) or not step or not seconds:
            return self.steps
        return min(self.steps, max(step, round(step * self.seconds / seconds)))

    def done(self, step: int, *, warmup: int, seconds: float = 0.0) -> float:
        """Share in [0, 1] of the run after its warm-up that is over when `step` steps are: the larger one, by steps or
        by time. It never falls as either goes on.

        By time the run will have steps / share steps if it goes on at its pace, of which those of the warm-up do not
        count; so the share after the warm-up starts at 0, too, and ends at 1 with the time.
        """
        if step <= warmup:
            return 0.0
        by_steps = min(1.0, (step - warmup) / max(1, self.steps - warmup))
        share = min(1.0, seconds / self.seconds)
        return max(by_steps, share * (step - warmup) / (step - share * warmup))


class Clock:
    """Seconds that a run has trained, over all restarts."""

    def __init__(self) -> None:
        self.before = 0.0  # until the last restart
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.monotonic()

    def seconds(self) -> float:
        """Until now; those before `start` where that has not been called."""
        return self.before + (0.0 if self._started is None else time.monotonic() - self._started)
