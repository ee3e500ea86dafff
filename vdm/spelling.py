"""How settings are spelled: YAML text to values of annotated types, and back.

YAML guesses at types, and YAML 1.1 takes `1e-4` for text and `no` for false. Here it does not guess: every scalar but
null stays text, and the annotation of the field that it is for says how to read it.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from vdm.errors import UserError


def parse(text: str, *, source: str) -> object:
    """YAML as dicts and lists of str and None. Raises UserError, which calls the text `source`."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{source} is not valid YAML: {problem}{line}") from None


def unparse(tree: Mapping[str, object]) -> str:
    """YAML of nested dicts of plain values and tuples; `parse` and `convert` read it back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def convert(value: object, annotation: Any, *, key: str) -> Any:
    """What `parse` gave, as a value of the annotated type: a scalar, Literal of text, Optional, Union or tuple[T, ...].

    Raises UserError such as "training.batch_size must be a whole number, got 'four'".
    """
    try:
        return _as(annotation, value)
    except ValueError:
        shown = "null" if value is None else repr(value)
        raise UserError(f"{key} must be {_described(annotation)}, got {shown}") from None


def _as(annotation: Any, value: object) -> object:
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _as_first_that_fits(options, value)
    if origin is Literal and value in options:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_as(options[0], item) for item in value)
    if value is None and annotation in (str, types.NoneType):  # nothing after the colon is the empty text
        return "" if annotation is str else None
    if isinstance(value, str) and annotation in _SCALARS:
        return _SCALARS[annotation][1](value)
    raise ValueError(value)


def _as_first_that_fits(options: tuple[Any, ...], value: object) -> object:
    for option in sorted(options, key=lambda option: option is not types.NoneType):  # null is null before it is text
        with suppress(ValueError):
            return _as(option, value)
    raise ValueError(value)


def _described(annotation: Any) -> str:
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(option) for option in options)
    if origin is Literal:
        return f"one of {', '.join(options)}" if len(options) > 1 else str(options[0])
    if origin is tuple:
        return f"a list, each item {_described(options[0])}"
    return "null" if annotation is types.NoneType else _SCALARS[annotation][0]


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = _number(text)  # 1e5 is a whole number too
        if not number.is_integer():
            raise
        return int(number)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "yes", "on", "false", "no", "off"):
        raise ValueError(text)
    return text.lower() in ("true", "yes", "on")


# What an error calls the type, and how its text is read: ValueError if it cannot be.
_SCALARS: dict[Any, tuple[str, Callable[[str], object]]] = {
    int: ("a whole number", _whole),
    float: ("a number", _number),
    bool: ("true or false", _truth),
    str: ("text", str),
}


class _Loader(yaml.SafeLoader):
    """Safe YAML whose scalars are text or null, and whose keys are text, each given once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(problem="a key is not text", problem_mark=key.start_mark)
            if key.value in seen:
                problem = f"{key.value} is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


_Loader.yaml_implicit_resolvers = {
    first_letter: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
    for first_letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Block style, with lists on one line."""

    def represent_line(self, items: tuple[object, ...]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)

    def represent_text(self, text: str) -> yaml.Node:
        style = None if text.isprintable() else '"'  # the other styles turn some control characters into blanks
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(tuple, _Dumper.represent_line)
_Dumper.add_representer(str, _Dumper.represent_text)
