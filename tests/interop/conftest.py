"""The small model on disk, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import stirred

from vdm.interop.convert import convert


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder in our layout; not to be changed."""
    folder = tmp_path_factory.mktemp("model") / "ours"
    stirred().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(model: Path) -> dict[str, Path]:
    """The same model in the other layouts; not to be changed."""
    folders = {layout: model.with_name(layout) for layout in ("diffusers", "modelscope")}
    for layout, folder in folders.items():
        convert(model, folder, to=layout, say=lambda line: None)  # type: ignore[arg-type]
    return folders
