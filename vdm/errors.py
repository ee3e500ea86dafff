"""The one exception that a user sees: one clear sentence that names the thing and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input from the user; the command line prints it as `error: <sentence>` and exits with 2."""


class Failure(Exception):
    """What was asked for was done, and went wrong; the command line prints it like bad input and exits with 1."""


class CannotWrite(UserError):
    """The disk refused: it is full, or read-only, or gone."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the machine has no more memory; PyTorch's for a CPU are of no class of their
    own."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def nearest(name: str, names: Iterable[str]) -> str:
    """The member of `names` that looks most like `name`, or "" when none is close."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return matches[0] if matches else ""
