"""A folder of latents and text contexts that were made once: sharded safetensors and an index.

    cache.json                    what it was made of and with (the key), and how many shards make it whole
    train-00000.safetensors       latents of so many consecutive clips, named CLIP.CROP or CLIP.CROP.mirrored, and in
    validation-00000.safetensors  the metadata what is to be known of each clip
    text-00000.safetensors        contexts (N, L, D), and in the metadata their captions

A shard is there in full or not at all, so a cache that was cut short goes on where it was. One that was made of other
data, or with other networks, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vdm.data.quarantine import Bad
from vdm.data.sources import Words
from vdm.errors import UserError
from vdm.files import in_words, names_in, replacing
from vdm.weights import SUFFIX, Weights, open_weights, read_metadata, write_safetensors

INDEX = "cache.json"
FORMAT_VERSION = 1
Split = Literal["train", "validation"]
Part = Literal["train", "validation", "text"]
SPLITS: tuple[Split, ...] = ("train", "validation")
PARTS: tuple[Part, ...] = (*SPLITS, "text")
Key = Mapping[str, object]


@dataclass(frozen=True)
class Entry:
    """What is to be known of a clip besides its latents; `problem` says why there are none."""

    id: str
    words: Words
    elapsed: float = 0.0  # seconds from the file's first frame to its last
    duration: float = 0.0
    problem: str = ""

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    @staticmethod
    def of_json(tree: Mapping[str, Any]) -> Entry:
        words = Words(**{**tree["words"], "placeholders": tuple(tree["words"]["placeholders"])})
        return Entry(**{**tree, "words": words})


@dataclass(frozen=True)
class Plan:
    """What a whole cache holds. `ids` is the `digest` of the clips that it is made of."""

    num_clips: Mapping[str, int]  # of each split
    num_texts: int
    per_shard: Mapping[str, int]  # clips, or texts
    missing: Mapping[str, Bad]  # clips of each split that are known to be unusable
    ids: str
    dtype: str  # of the numbers

    def num_shards(self, part: Part) -> int:
        count = self.num_texts if part == "text" else self.num_clips[part]
        return -(-count // self.per_shard[part])

    def span(self, part: Part, number: int) -> range:
        """What a shard holds, by its index."""
        count = self.num_texts if part == "text" else self.num_clips[part]
        first = number * self.per_shard[part]
        return range(first, min(first + self.per_shard[part], count))


class Cache:
    """A cache that can be written to, or one that is whole and can be read."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self._open: dict[tuple[Part, int], Weights] = {}
        self._entries: dict[Split, list[Entry]] = {}
        self._places: dict[str, tuple[int, int]] = {}  # of a caption: shard and row

    # --- writing

    @staticmethod
    def start(folder: Path, key: Key, plan: Plan) -> Cache:
        """Begin a cache, or go on with one of the same key. Raises UserError where the folder holds another."""
        index = _read_index(folder)
        if index is None:
            _refuse_strangers(folder)
            _write_index(folder, key, plan, whole=False)
        else:
            _refuse_other(folder, index["key"], key)
            theirs = _plan_of(index)
            if theirs.dtype != plan.dtype:
                raise UserError(f"{folder} holds {theirs.dtype}; give the same --dtype, or another data.cache_dir")
            if theirs != plan:
                raise UserError(f"{folder} was begun with other clips than there are now; remove it and start again")
        return Cache(folder, plan)

    @staticmethod
    def is_whole(folder: Path, key: Key, plan: Plan) -> bool:
        """Whether such a cache is there already, and all its shards are what they should be. Raises UserError where
        the folder holds something else."""
        index = _read_index(folder)
        if index is None:
            _refuse_strangers(folder)
            return False
        _refuse_other(folder, index["key"], key)
        cache = Cache(folder, _plan_of(index))
        if cache.plan != plan or not index["whole"] or any(map(cache.to_do, PARTS)):
            return False
        for split in SPLITS:
            cache.entries(split)
        for number in range(plan.num_shards("text")):
            cache.shard_captions(number)
        return True

    def path(self, part: Part, number: int) -> Path:
        return self.folder / f"{part}-{number:05d}{SUFFIX}"

    def to_do(self, part: Part) -> list[int]:
        """The shards of a part that are not there yet."""
        return [number for number in range(self.plan.num_shards(part)) if not self.path(part, number).is_file()]

    def write_clips(self, split: Split, number: int, entries: Sequence[Entry], latents: Mapping[str, Tensor]) -> None:
        """A shard; `latents` are named by `look_name`. Raises OSError."""
        metadata = {"of": f"{split} {number}", "clips": json.dumps([entry.as_json() for entry in entries])}
        write_safetensors(self.path(split, number), latents, metadata=metadata)

    def write_texts(self, number: int, captions: Sequence[str], contexts: Tensor) -> None:
        """A shard of contexts (N, L, D). Raises OSError."""
        metadata = {"of": f"text {number}", "captions": json.dumps(list(captions))}
        write_safetensors(self.path("text", number), {"context": contexts}, metadata=metadata)

    def finish(self, key: Key) -> None:
        """Say that it is whole."""
        _write_index(self.folder, key, self.plan, whole=True)

    # --- reading

    @staticmethod
    def open(folder: Path, key: Key) -> Cache:
        """A whole cache of this key. Raises UserError that says in what another differs."""
        index = _read_index(folder)
        if index is None:
            raise UserError(f"{folder} is no cache; make it with: vdm data cache CONFIG.yaml data.cache_dir={folder}")
        _refuse_other(folder, index["key"], key)
        cache = Cache(folder, _plan_of(index))
        missing = sum(len(cache.to_do(part)) for part in PARTS)
        if missing or not index["whole"]:
            raise UserError(f"{folder} is not whole, {missing} shards are missing; vdm data cache goes on with it")
        return cache

    def entries(self, split: Split) -> list[Entry]:
        """Of all clips of a split."""
        if split not in self._entries:
            numbers = range(self.plan.num_shards(split))
            self._entries[split] = [entry for number in numbers for entry in self.shard_entries(split, number)]
        return self._entries[split]

    def shard_entries(self, split: Split, number: int) -> list[Entry]:
        """Of the clips in one shard."""
        return [Entry.of_json(tree) for tree in self._told(split, number, "clips")]

    def latents(self, split: Split, index: int, crop: int, mirrored: bool) -> Tensor:
        """The moments (2C,T,h,w) of a clip's longest window."""
        shard = self._shard(split, index // self.plan.per_shard[split])
        return shard[look_name(index, crop, mirrored)]

    def contexts(self, captions: Iterable[str]) -> Tensor:
        """Of captions that it has (B, L, D). Raises UserError for another."""
        if not self._places:
            for number in range(self.plan.num_shards("text")):
                for row, caption in enumerate(self.shard_captions(number)):
                    self._places[caption] = number, row
        rows = []
        for caption in captions:
            if caption not in self._places:
                raise UserError(f"{self.folder} has no text {caption!r}; remove it and run vdm data cache again")
            number, row = self._places[caption]
            rows.append(self._shard("text", number)["context"][row])
        return torch.stack(rows)

    def shard_captions(self, number: int) -> list[str]:
        """Of the contexts in one shard."""
        return self._told("text", number, "captions")

    def _told(self, part: Part, number: int, name: str) -> list[Any]:
        """What the metadata of a shard say. Raises UserError where it is damaged, or is another."""
        path = self.path(part, number)
        self._shard(part, number)
        try:
            metadata = read_metadata(path)
            told = list(json.loads(metadata[name]))
            if metadata["of"] != f"{part} {number}" or len(told) != len(self.plan.span(part, number)):
                raise ValueError("it is another shard's")
        except (LookupError, ValueError, TypeError) as error:
            raise _damaged(path, str(error)) from error
        return told

    def _shard(self, part: Part, number: int) -> Weights:
        if (part, number) not in self._open:
            path = self.path(part, number)
            try:
                self._open[part, number] = open_weights(path)
            except UserError as error:
                raise _damaged(path, str(error).rpartition(";")[0]) from error
        return self._open[part, number]


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}); remove it, and vdm data cache makes it anew")


def _refuse_strangers(folder: Path) -> None:
    if folder.is_dir() and any(not path.name.startswith(".") for path in names_in(folder)):
        raise UserError(f"{folder} is no cache and not empty; choose another data.cache_dir")


def look_name(index: int, crop: int, mirrored: bool) -> str:
    return f"{index}.{crop}.mirrored" if mirrored else f"{index}.{crop}"


def _read_index(folder: Path) -> dict[str, Any] | None:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        newer = index["format_version"] > FORMAT_VERSION
        assert isinstance(index["key"], dict) and isinstance(index["whole"], bool), "it is no index"
        _plan_of(index)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{folder / INDEX} cannot be read: {in_words(error)}; change that") from error
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise UserError(f"{folder / INDEX} is damaged ({error}); remove the folder and make it anew") from error
    if newer:
        raise UserError(f"{folder} was written by a newer vdm; update vdm, or remove it")
    return dict(index)


def _plan_of(index: Mapping[str, Any]) -> Plan:
    """Raises all that a damaged index may lead to."""
    told = dict(index["plan"])
    told["missing"] = {split: [(name, reason) for name, reason in told["missing"][split]] for split in SPLITS}
    plan = Plan(**told)
    counts = [plan.num_texts, *(plan.num_clips[split] for split in SPLITS), *plan.per_shard.values()]
    assert all(type(count) is int and count >= 0 for count in counts), "its numbers are none"
    assert all(plan.per_shard[part] > 0 for part in PARTS), "its shards are empty"
    return plan


def _write_index(folder: Path, key: Key, plan: Plan, *, whole: bool) -> None:
    tree = {"format_version": FORMAT_VERSION, "whole": whole, "key": key, "plan": asdict(plan)}
    with replacing(folder / INDEX, remedy="choose another data.cache_dir") as file:
        file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _refuse_other(folder: Path, theirs: Key, ours: Key) -> None:
    """Raises UserError that names all in which two keys differ."""
    differ = [
        f"{name} was {_shown(theirs.get(name))} and is {_shown(ours.get(name))}"
        for name in (*ours, *(name for name in theirs if name not in ours))
        if json.dumps(theirs.get(name)) != json.dumps(ours.get(name))
    ]
    if differ:
        raise UserError(
            f"cache {folder} is stale: {'; '.join(differ)}; make another with vdm data cache, or set these back"
        )


def _shown(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else json.dumps(value)
