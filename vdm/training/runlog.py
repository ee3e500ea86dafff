"""What a run says while it goes: a progress bar, `log.jsonl`, TensorBoard."""

from __future__ import annotations

import json
import math
import sys
from contextlib import suppress
from pathlib import Path

import cv2
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vdm.files import replacing
from vdm.training.preview import SHEET


class RunLog:
    """Records of a run, one object a step; a resumed run continues the files as if it had never stopped."""

    def __init__(self, run_dir: Path, *, first_step: int, num_steps: int):
        self.path = run_dir / "log.jsonl"
        self._forget_after(first_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step and first_step + 1)
        self._bar = tqdm(total=num_steps, initial=first_step, desc=run_dir.name, file=sys.stderr, dynamic_ncols=True)

    def _forget_after(self, step: int) -> None:
        """Drop what an interrupted run logged after the checkpoint that is resumed, and a line cut short.

        Step 0 is what a run says before it starts: a fresh one says it again.
        """
        if not self.path.exists():
            return
        lines = self.path.read_bytes().decode("utf-8", "replace").splitlines()
        kept = [line + "\n" for line in lines if step > 0 and 0 <= _step_of(line) <= step]
        with replacing(self.path) as file:
            file.write_text("".join(kept), encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log the numbers of a step; TensorBoard gets them as scalars."""
        # JSON has no word for what is not finite.
        line = {"step": step, **{key: round(v, 8) if math.isfinite(v) else None for key, v in values.items()}}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
        except OSError as error:  # a full disk, say, which is no reason to stop
            self.say(f"warning: the log of step {step} cannot be written: {error}")

    def show(self, step: int, folder: Path) -> None:
        """A preview in TensorBoard: its contact sheet, for clips there would need another package."""
        try:
            sheet = cv2.imread(str(folder / SHEET))
            if sheet is not None:
                self._board.add_image("previews", sheet[..., ::-1].copy(), step, dataformats="HWC")
        except OSError as error:
            self.say(f"warning: the preview of step {step} is not in TensorBoard: {error}")

    def advance(self, loss: float, rate: float, *, num_steps: int) -> None:
        """One step done, of so many as it looks now."""
        self._bar.total = num_steps
        self._bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}", refresh=False)
        self._bar.update()

    def say(self, message: str) -> None:
        """A line for the reader, above the progress bar."""
        self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """End the bar and flush the files."""
        self._bar.close()
        for file in (self._file, self._board):
            with suppress(OSError):  # what a full disk has kept them from writing
                file.close()


def _step_of(line: str) -> int:
    """The step of a line of the log; -1 where it has none, being damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return -1
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else -1


class NoLog:
    """What the processes that do not write the run folder have for a log."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def show(self, step: int, folder: Path) -> None: ...

    def advance(self, loss: float, rate: float, *, num_steps: int) -> None: ...

    def say(self, message: str) -> None: ...

    def close(self) -> None: ...
