"""Which clips there are: one function for every format of a data set."""

from __future__ import annotations

from pathlib import Path

from vdm.data.folder import find_folder
from vdm.data.listing import find_listed
from vdm.data.settings import DataConfig
from vdm.data.shards import find_shards
from vdm.data.ssv2 import ClipFile, Split, find_ssv2, has_annotations
from vdm.errors import UserError


def find_clips(config: DataConfig, split: Split) -> list[ClipFile]:
    """The clips of one split as the data set lists them, unusable ones too. Raises UserError."""
    if config.root is None:
        raise UserError(f"data.format={config.format} reads files; set data.root to where they are")
    if config.format == "webdataset":
        return find_shards(config.root, split)
    if config.format in ("jsonl", "csv"):
        return find_listed(config.root, split, kind="csv" if config.format == "csv" else "jsonl")
    return find_ssv2(config.root, split) if config.format == "ssv2" else find_folder(config.root, split)


def guess_format(root: str) -> DataConfig:
    """The data section for a data set, by what it looks like, all else as by default. Raises UserError."""
    if root.endswith(".jsonl"):
        return DataConfig(format="jsonl", root=root)
    if root.endswith(".csv"):
        return DataConfig(format="csv", root=root)
    if root.endswith(".tar") or (Path(root).is_dir() and any(Path(root).glob("*.tar"))):
        return DataConfig(format="webdataset", root=root)
    return DataConfig(format="ssv2" if has_annotations(root) else "folder", root=root)
