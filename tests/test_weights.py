"""Weight files: what is written is read, one tensor at a time, and what is no weight file is named."""

from __future__ import annotations

import json
import pickle
import struct
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vdm.errors import UserError
from vdm.weights import Weights, fill, open_weights, read_metadata, sha256, spec, write_safetensors

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
STATE = {"b.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


@st.composite
def states(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=0, max_size=5, unique=True))
    shape = st.lists(st.integers(0, 4), max_size=4)
    return {
        name: (torch.rand(draw(shape)) * 100).to(draw(st.sampled_from(DTYPES))) for name in names if name[0] < "\ud800"
    }


@settings(max_examples=60)
@given(state=states())
def test_the_library_reads_what_is_written(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]) -> None:
    path = tmp_path_factory.mktemp("written") / "w.safetensors"
    write_safetensors(path, state, metadata={"format": "pt"})
    theirs, ours = safetensors.torch.load_file(path), open_weights(path)
    assert set(theirs) == set(ours) == set(state)
    for name, tensor in state.items():
        assert torch.equal(theirs[name], tensor) and theirs[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor) and ours.specs[name].shape == tensor.shape
        assert ours.specs[name].dtype == tensor.dtype
    assert read_metadata(path) == {"format": "pt"}


def test_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read(name: str) -> Tensor:
        nonlocal most
        tensor = torch.full((100,), float(name))
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    names = [str(i) for i in range(20)]
    weights = Weights({name: spec((100,), torch.float32) for name in names}, read)
    write_safetensors(tmp_path / "w.safetensors", weights.renamed(lambda n: f"x.{n}").cast(torch.float16))
    assert len(alive) == 20 and most <= 2
    assert open_weights(tmp_path / "w.safetensors")["x.7"].unique().tolist() == [7.0]


def test_views_of_weights() -> None:
    weights = Weights.of(STATE).renamed(lambda name: name.removeprefix("b.") if name.startswith("b.") else None)
    assert list(weights) == ["weight"] and torch.equal(weights["weight"], STATE["b.weight"])
    more = weights.updated({"weight": torch.zeros(1), "new": torch.ones(2)})
    assert dict(more).keys() == {"weight", "new"} and more["weight"].shape == more.specs["weight"].shape == (1,)
    halves = Weights.of({"f": torch.ones(1), "i": torch.ones(1, dtype=torch.int32)}).cast(torch.float16)
    assert [halves[name].dtype for name in "fi"] == [torch.float16, torch.int32]
    assert [halves.specs[name].dtype for name in "fi"] == [torch.float16, torch.int32]


# ---- pickles


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
def test_what_torch_saved_is_read(tmp_path: Path, legacy: bool, wrap: object) -> None:
    path = tmp_path / "w.pth"
    torch.save(wrap(STATE), path, _use_new_zipfile_serialization=not legacy)  # type: ignore[operator]
    weights = open_weights(path)
    assert weights.keys() == STATE.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in STATE.items())


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".ckpt"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, suffix: str) -> None:
    path, mark = tmp_path / f"w{suffix}", tmp_path / "it ran"
    torch.save({"state_dict": STATE, "callbacks": Bomb(mark)}, path)
    with pytest.raises(
        UserError, match=rf"w{suffix} is a pickle that asks to run [\w.]+, and .* \.safetensors version"
    ):
        open_weights(path)
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UserError, match=f"w{suffix} cannot be read .*a pickle of more than tensors") as caught:
        open_weights(path)
    assert "weights_only" not in str(caught.value)
    assert not mark.exists()


# ---- damage


def test_a_truncated_file_names_the_first_tensor_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, STATE)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"w.safetensors .*it is truncated: a.bias and 0 more tensors are cut off"):
        open_weights(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 4, struct.pack("<Q", 2) + b"{}" + b"junk", struct.pack("<Q", 1 << 60), b"<html>not found</html>",
     struct.pack("<Q", 8) + b'{"a": 1}', struct.pack("<Q", 2) + b"[]"],
)  # fmt: skip
def test_what_is_no_weight_file_is_named(tmp_path: Path, content: bytes) -> None:
    for suffix in (".safetensors", ".bin"):
        path = tmp_path / f"w{suffix}"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"w{suffix} cannot be read as a weight file .*download or copy it again"):
            open_weights(path)
    with pytest.raises(UserError, match="weight file .*nowhere.bin does not exist"):
        open_weights(tmp_path / "nowhere.bin")


def shards(folder: Path) -> Path:
    """An index of two files."""
    for i, (name, tensor) in enumerate(STATE.items()):
        write_safetensors(folder / f"w-{i}.safetensors", {name: tensor})
    index = folder / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"w-{i}.safetensors" for i, name in enumerate(STATE)}}))
    return index


def test_a_sharded_set_is_one(tmp_path: Path) -> None:
    weights = open_weights(shards(tmp_path))
    assert weights.keys() == STATE.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize(
    "bad",
    [torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta"), torch.eye(2).to_sparse(), "text"],
    ids=["complex", "meta", "sparse", "text"],
)
def test_a_pickle_of_other_tensors_is_named(tmp_path: Path, bad: object) -> None:
    torch.save({**STATE, "odd": bad}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w.pth.*odd"):
        open_weights(tmp_path / "w.pth")
    torch.save({0: torch.ones(1)}, tmp_path / "n.pth")
    with pytest.raises(UserError, match=r"n.pth holds a Tensor under 0"):
        open_weights(tmp_path / "n.pth")


def test_an_index_of_itself_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    with pytest.raises(UserError, match="is not the index of a sharded weight file"):
        open_weights(index)
    index.write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not the index of a sharded weight file"):
        open_weights(index)


def test_a_shard_that_is_gone_or_holds_something_else_is_named(tmp_path: Path) -> None:
    index = shards(tmp_path)
    write_safetensors(tmp_path / "w-1.safetensors", {"c": torch.ones(1)})
    with pytest.raises(UserError, match="says that a.bias is in w-1.safetensors, which has no such tensor"):
        open_weights(index)
    (tmp_path / "w-1.safetensors").unlink()
    with pytest.raises(UserError, match="w-1.safetensors does not exist"):
        open_weights(index)
    index.write_text("[]")
    with pytest.raises(UserError, match="is not the index of a sharded weight file"):
        open_weights(index)


# ---- into a module


def test_fill_copies_all_or_nothing() -> None:
    state = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    bad = {
        "no bias": ({"weight": state["weight"]}, "there is no bias"),
        "shape": ({**state, "weight": torch.ones(3, 3)}, r"weight is \(3, 3\), but \(2, 3\)"),
        "extra": ({**state, "scale": torch.ones(1), "shift": torch.ones(1)}, "has no scale and 1 more"),
    }
    for weights, sentence in bad.values():
        layer = nn.Linear(3, 2)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(UserError, match=f"^here: .*{sentence}"):
            fill(layer, weights, source="here")
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    layer = nn.Linear(3, 2)
    bias = layer.bias.clone()
    fill(layer, {"weight": state["weight"].half()}, source="here", keep=("bias",))
    assert torch.equal(layer.weight, state["weight"]) and torch.equal(layer.bias, bias)


def test_a_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
