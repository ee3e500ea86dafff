"""The folder of a cache: shards, index, and which are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vdm.data.cache import Cache, Entry, Plan, look_name
from vdm.data.sources import Words
from vdm.errors import UserError

KEY = {"data.height": 64, "data.root": "clips", "the VAE's encoder": "a" * 64}
PLAN = Plan(
    num_clips={"train": 5, "validation": 1},
    num_texts=3,
    per_shard={"train": 2, "validation": 2, "text": 2},
    missing={"train": [("7", "no file")], "validation": []},
    ids="x",
    dtype="float16",
)


def entry(index: int) -> Entry:
    return Entry(f"clip {index}", Words(f"pushing {index}", "Pushing [something]", (str(index),)), 2.5, 2.625)


def moments(index: int) -> torch.Tensor:
    return torch.full((2, 3, 1, 1), float(index), dtype=torch.float16)


def write(folder: Path, *, whole: bool = True) -> Cache:
    cache = Cache.start(folder, KEY, PLAN)
    for split in ("train", "validation"):
        for number in cache.to_do(split):
            span = PLAN.span(split, number)
            cache.write_clips(
                split, number, [entry(i) for i in span], {look_name(i, 0, False): moments(i) for i in span}
            )
    for number in cache.to_do("text"):
        texts = [f"text {i}" for i in PLAN.span("text", number)]
        cache.write_texts(number, texts, torch.tensor([float(text[-1]) for text in texts])[:, None, None])
    if whole:
        cache.finish(KEY)
    return cache


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "cache.json", "text-00000.safetensors", "text-00001.safetensors", "train-00000.safetensors",
        "train-00001.safetensors", "train-00002.safetensors", "validation-00000.safetensors",
    ]  # fmt: skip
    cache = Cache.open(tmp_path / "cache", KEY)
    assert cache.plan == PLAN
    assert cache.entries("train") == [entry(i) for i in range(5)] and cache.entries("validation") == [entry(0)]
    for index in (4, 0, 3):
        assert torch.equal(cache.latents("train", index, 0, False), moments(index))
    assert cache.contexts(["text 2", "text 0", "text 2"]).flatten().tolist() == [2.0, 0.0, 2.0]
    with pytest.raises(UserError, match="has no text 'text 9'"):
        cache.contexts(["text 9"])


@given(st.integers(0, 50), st.integers(1, 9))
def test_shards_share_out_all_clips(count: int, per_shard: int) -> None:
    plan = replace(PLAN, num_clips={"train": count, "validation": 0}, per_shard={**PLAN.per_shard, "train": per_shard})
    spans = [plan.span("train", number) for number in range(plan.num_shards("train"))]
    assert [index for span in spans for index in span] == list(range(count))
    assert all(span[0] // per_shard == number for number, span in enumerate(spans))


@given(st.text(), st.text(), st.lists(st.text(), max_size=3), st.floats(0, 1e4), st.text())
def test_entries_travel_as_json(name: str, caption: str, placeholders: list[str], seconds: float, problem: str) -> None:
    told = Entry(name, Words(caption, "t", tuple(placeholders)), seconds, seconds, problem)
    assert Entry.of_json(json.loads(json.dumps(told.as_json()))) == told


def test_it_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    cache = write(tmp_path, whole=False)
    cache.path("train", 1).unlink()
    cache.path("text", 0).unlink()
    with pytest.raises(UserError, match="is not whole, 2 shards are missing; vdm data cache goes on with it"):
        Cache.open(tmp_path, KEY)
    again = Cache.start(tmp_path, KEY, PLAN)
    assert (again.to_do("train"), again.to_do("validation"), again.to_do("text")) == ([1], [], [0])
    write(tmp_path)
    assert Cache.open(tmp_path, KEY).entries("train") == [entry(i) for i in range(5)]


@pytest.mark.parametrize("change", [{"data.height": 32}, {"the VAE's encoder": "b" * 64}, {"seed": 3}])
def test_another_key_is_refused_with_the_reason(tmp_path: Path, change: dict[str, object]) -> None:
    write(tmp_path)
    [(name, value)] = change.items()
    shown = "bbbbbbbbbbbb..." if name.startswith("the") else str(value)
    for call in (
        lambda: Cache.open(tmp_path, {**KEY, **change}),
        lambda: Cache.start(tmp_path, {**KEY, **change}, PLAN),
    ):
        with pytest.raises(UserError, match="is stale: ") as caught:
            call()
        assert f"{name} was " in str(caught.value) and f" and is {shown};" in str(caught.value)
    with pytest.raises(UserError, match=r"is stale: data.root was \"clips\" and is null"):
        Cache.open(tmp_path, {**KEY, "data.root": None})


def test_other_clips_are_refused_when_it_goes_on(tmp_path: Path) -> None:
    write(tmp_path, whole=False)
    with pytest.raises(UserError, match="was begun with other clips than there are now"):
        Cache.start(tmp_path, KEY, replace(PLAN, ids="y"))


def test_folders_that_are_no_caches(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no cache; make it with: vdm data cache CONFIG.yaml data.cache_dir="):
        Cache.open(tmp_path / "none", KEY)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is no cache and not empty; choose another data.cache_dir"):
        Cache.start(tmp_path, KEY, PLAN)
    with pytest.raises(UserError, match="cannot write .*; choose another data.cache_dir"):
        Cache.start(tmp_path / "thesis.tex", KEY, PLAN)
    (tmp_path / "thesis.tex").unlink()
    write(tmp_path)
    index = json.loads((tmp_path / "cache.json").read_text())
    for damage, sentence in (
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        (json.dumps({**index, "plan": {**index["plan"], "num_clips": {}}}), "is damaged"),
        (
            json.dumps({**index, "plan": {**index["plan"], "per_shard": {"train": 0, "validation": 1, "text": 1}}}),
            "is damaged",
        ),
        (json.dumps({**index, "plan": {}}), "is damaged"),
        (json.dumps({**index, "format_version": 99}), "was written by a newer vdm"),
    ):
        (tmp_path / "cache.json").write_text(damage)
        with pytest.raises(UserError, match=sentence):
            Cache.open(tmp_path, KEY)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    shard = tmp_path / "train-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(
        UserError, match="train-00001.safetensors is damaged .*truncated.*; remove it, and vdm data cache makes it anew"
    ):
        Cache.open(tmp_path, KEY).entries("train")
