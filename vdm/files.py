"""Files that appear whole or not at all, and questions that a file system may refuse to answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vdm.errors import CannotWrite, UserError


@contextmanager
def replacing(path: Path, *, remedy: str = "choose a folder that can be written") -> Iterator[Path]:
    """A name beside `path` to write to: moved over it on success, removed on failure. Folders are made as needed.

    Raises CannotWrite, which ends with `remedy`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        taken = isinstance(error, FileExistsError | NotADirectoryError)
        reason = f"{path.parent} is not a folder" if taken else in_words(error)
        raise CannotWrite(f"cannot write {path}: {reason}; {remedy}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def at_home(path: str | Path) -> Path:
    """A path whose ~ stands for a home; of a user that is not there it is left as it is."""
    return Path(os.path.expanduser(path))


def is_file(path: Path) -> bool:
    """Whether it is a plain file, as far as one is let look."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def names_in(folder: Path) -> list[Path]:
    """What lies in a folder. Raises UserError where one may not look."""
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {in_words(error)}; change that or choose another") from error


def in_words(error: BaseException) -> str:
    """The system's own short sentence, without error numbers and function names."""
    text = getattr(error, "strerror", None) or str(error)
    return text[:1].lower() + text[1:]
