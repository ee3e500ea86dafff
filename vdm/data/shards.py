"""Clips in WebDataset tar shards, for data that outgrow one disk: local paths, or any URL that fsspec opens.

Of each shard only the headers and captions are read at the start; a clip is read when its turn comes, by its place in
the tar, so that the order of a run is the same as from files.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from itertools import product

import fsspec

from vdm.data.captions import filled
from vdm.data.packed import Packed
from vdm.data.ssv2 import VIDEO_EXTENSIONS, ClipFile, NoSuchSplit, Split, validation_ids
from vdm.errors import UserError
from vdm.files import at_home

CAPTIONS = (".txt", ".json")


def find_shards(root: str, split: Split) -> list[ClipFile]:
    """The clips of one split in `root`: a .tar, a folder of them, or a pattern such as "s3://bucket/{000..099}.tar".

    A sample is the files of one name: a video of any kind, and `.txt` with its caption or `.json` with `caption`, or
    SSv2's own entry. Validation is the tenth of the names with the smallest hash, at least one. Raises UserError.
    """
    clips: dict[str, ClipFile] = {}
    urls = expand(root)
    for url in urls:
        for clip in _clips(url):
            if clip.id in clips:
                raise UserError(f"{url} and {clips[clip.id].path} both hold a clip {clip.id}; give each its own name")
            clips[clip.id] = clip
    held_out = validation_ids(clips) if clips else frozenset()
    chosen = [clip for name, clip in clips.items() if (name in held_out) == (split == "validation")]
    if split == "test" or not chosen:
        raise NoSuchSplit(f"the {split} split of {root} is empty: of {len(clips)} clips none is left for it")
    return chosen


def expand(root: str) -> list[str]:
    """The shards that a root stands for, in order. Raises UserError where a folder has none."""
    folder = at_home(root)
    if "://" not in root and folder.is_dir():
        found = sorted(str(path) for path in folder.glob("*.tar"))
        if not found:
            raise UserError(f"data folder {root} holds no .tar; data.format=webdataset wants tar shards")
        return found
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", root)
    choices: list[list[str]] = [[pieces[0]]]
    for first, last, rest in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        choices.append([str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)])
        choices.append([rest])
    return ["".join(parts) for parts in product(*choices)]


def _clips(url: str) -> Iterator[ClipFile]:
    """The clips of one shard, in its order."""
    videos: dict[str, Packed] = {}
    said: dict[str, Mapping[str, object]] = {}
    try:
        with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, dot, rest = base.partition(".")
                key, suffix = f"{folder}/{stem}" if folder else stem, f".{rest.rpartition('.')[2].lower()}"
                if not member.isfile() or not stem or not dot:
                    continue
                if suffix in VIDEO_EXTENSIONS:
                    videos[key] = Packed(member.name, url, member.offset_data, member.size)
                elif suffix in CAPTIONS and (content := tar.extractfile(member)) is not None:
                    said[key] = {**said.get(key, {}), **_said(content.read(), suffix)}
    except tarfile.TarError as error:
        raise UserError(f"shard {url} is no plain tar ({error}); unpack or download it again") from error
    except (OSError, ValueError, ImportError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"shard {url} cannot be read ({reason}); set data.root to tar files or URLs") from error
    for key, video in videos.items():
        yield _clip(key, video, said.get(key, {}))


def _said(content: bytes, suffix: str) -> Mapping[str, object]:
    """What a caption file says; nothing where it cannot be read, and the clip is then without a caption."""
    try:
        text = content.decode("utf-8-sig")
        tree = {"caption": text.strip()} if suffix == ".txt" else json.loads(text)
    except ValueError:
        return {}
    return tree if isinstance(tree, Mapping) else {}


def _clip(key: str, video: Packed, said: Mapping[str, object]) -> ClipFile:
    text = next((str(said[name]).strip() for name in ("caption", "label") if said.get(name)), "")
    problem = "" if text else "it has no caption"
    return ClipFile(key, video, text, problem, *filled(said))
