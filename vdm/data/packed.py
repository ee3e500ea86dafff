"""A file inside another one: so many bytes of what fsspec opens, be it here or far away."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import fsspec


@dataclass(frozen=True)
class Packed:
    """`size` bytes from `offset` on of `url`; `data` holds them once they are loaded."""

    name: str
    url: str
    offset: int
    size: int
    data: bytes | None = None

    def __str__(self) -> str:
        return f"{self.url}:{self.name}"

    def loaded(self) -> Packed:
        """With its bytes in memory. Raises OSError."""
        if self.data is not None:
            return self
        with fsspec.open(self.url, "rb") as file:
            file.seek(self.offset)
            return replace(self, data=file.read(self.size))


File = str | Path | Packed
