"""No decorative key: whatever a config can say, some line outside the checks of its own dataclass reads."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from vdm.config import Config

ROOT = Path(__file__).resolve().parents[1]
ONLY_CHECKED = {"effective_batch_size", "num_gpus"}  # by contract: they restate other keys, and must agree with them
KEYS = sorted(
    (section.name, key.name)
    for section in fields(Config)
    if section.default_factory is not None and hasattr(section.default_factory, "__dataclass_fields__")
    for key in fields(section.default_factory)  # type: ignore[arg-type]
)


def attributes_read(source: str) -> set[str]:
    """Names of all attributes that a module reads, except in `__post_init__`, where a dataclass checks itself."""
    tree = ast.parse(source)
    checks = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == "__post_init__"
        for node in ast.walk(function)
    }
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in checks}


READ = set().union(*(attributes_read(path.read_text(encoding="utf-8")) for path in (ROOT / "vdm").rglob("*.py")))


def test_all_sections_are_looked_at() -> None:
    assert {section for section, _ in KEYS} == {"model", "vae", "text", "diffusion", "data", "training", "sampling"}


def test_a_check_alone_does_not_count_as_reading() -> None:
    source = (
        "class A:\n    def __post_init__(self):\n        assert self.a\n    def use(self):\n        return self.b\n"
    )
    assert attributes_read(source) == {"b"}


@pytest.mark.parametrize(("section", "key"), [place for place in KEYS if place[1] not in ONLY_CHECKED])
def test_every_key_is_read(section: str, key: str) -> None:
    assert key in READ, f"{section}.{key} is accepted and does nothing"
