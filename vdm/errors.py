"""The one exception that a user sees: one clear sentence that names the thing and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input from the user; the command line prints it as `error: <sentence>` and exits with 2."""


class CannotWrite(UserError):
    """The disk refused: it is full, or read-only, or gone."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The member of `names` that looks most like `name`, or "" when none is close."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return matches[0] if matches else ""
