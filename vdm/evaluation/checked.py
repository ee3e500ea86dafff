"""JSON that somebody may have edited, as dataclasses: the keys and types must be theirs, and numbers finite."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_args, get_origin

T = TypeVar("T")
WRONG = (ValueError, TypeError, RecursionError)  # what reading, checking and hashing raise of bad content
LARGEST = 1e100  # no metric comes near, and squares of what is larger are no floats


def built(kind: type[T], entry: object) -> T:
    """A dataclass of an object that has its fields as keys, and no others. Raises one of WRONG."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(entry, dict) or entry.keys() != names:
        raise ValueError(f"{_short(entry)} has not the keys of a {kind.__name__.lower()}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _as(hints[name], value, name) for name, value in entry.items()})


def _as(hint: Any, value: object, name: str) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _as(next(one for one in options if one is not types.NoneType), value, name)
    if origin is tuple and isinstance(value, list):
        if options[-1] is ...:
            return tuple(_as(options[0], one, name) for one in value)
        return tuple(_as(one, item, name) for one, item in zip(options, value, strict=True))
    if origin is Mapping and isinstance(value, dict):
        return {key: _as(options[1], one, f"{name} {key}") for key, one in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return float(value)
    if hint is object or (hint in (str, int, bool) and type(value) is hint):
        return value
    raise ValueError(f"{name} {_short(value)} is not what it should be")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
