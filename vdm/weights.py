"""Weight files: a tensor is read when it is asked for and written when it is made, so no file is ever held whole.

Only tensors are read. A pickle that asks for anything else is refused, never run.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vdm.errors import UserError

SUFFIX = ".safetensors"
# What safetensors calls the types of its tensors.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Weights(Mapping[str, Tensor]):
    """Tensors by name, on the CPU, each read anew whenever it is asked for.

    `specs` holds a tensor on the meta device for each: its shape and dtype, which cost no reading.
    """

    def __init__(self, specs: Mapping[str, Tensor], read: Callable[[str], Tensor]):
        self.specs = dict(specs)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def renamed(self, rename: Callable[[str], str | None]) -> Weights:
        """The same tensors under other names; those that `rename` calls None are left out."""
        old = {new: name for name in self.specs if (new := rename(name)) is not None}
        return Weights({new: self.specs[name] for new, name in old.items()}, lambda new: self._read(old[new]))

    def cast(self, dtype: torch.dtype | None) -> Weights:
        """The same, its floating-point tensors as `dtype`; None changes nothing.

        Reading one raises UserError where a number is too large for that.
        """
        specs = {name: to_float(spec, dtype) for name, spec in self.specs.items()}

        def read(name: str) -> Tensor:
            tensor = self._read(name)
            as_dtype = to_float(tensor, dtype)
            if as_dtype is not tensor and not torch.equal(as_dtype.isinf(), tensor.isinf()):
                raise UserError(
                    f"{name} reaches {tensor.abs().max().item():.3g}, too much for {dtype}; use bf16 or fp32"
                )
            return as_dtype

        return Weights(specs, read)

    def updated(self, tensors: Mapping[str, Tensor]) -> Weights:
        """The same with `tensors` added or put in the place of others; a lazy mapping stays lazy."""
        specs = {**self.specs, **_specs(tensors)}
        return Weights(specs, lambda name: tensors[name] if name in tensors else self._read(name))

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Weights:
        """Tensors that are in memory already, such as a state dict."""
        return tensors if isinstance(tensors, Weights) else Weights(_specs(tensors), tensors.__getitem__)


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(tensors, Weights):
        return tensors.specs
    return {name: spec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def spec(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the meta device: a shape and a dtype."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def to_float(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating-point tensor as `dtype`; any other as it is."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def require_fit(
    ours: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, source: str, keep: Collection[str] = ()
) -> None:
    """Raises UserError where a tensor of `ours` is missing in `weights`, unless in `keep`, or unknown, or of another
    shape, or a whole number in place of a fraction."""
    theirs, remedy = Weights.of(weights), "use the config that they were made with"
    for name, tensor in ours.items():
        if name not in theirs and name not in keep:
            raise UserError(f"{source}: there is no {name}, which this config has ({tuple(tensor.shape)}); {remedy}")
        if name in theirs and theirs.specs[name].shape != tensor.shape:
            shapes = f"{tuple(theirs.specs[name].shape)}, but {tuple(tensor.shape)} in this config"
            raise UserError(f"{source}: {name} is {shapes}; {remedy}")
        if name in theirs and theirs.specs[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{source}: {name} is of {theirs.specs[name].dtype}, not {tensor.dtype}; {remedy}")
    if unknown := [name for name in theirs if name not in ours]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"{source}: this config has no {unknown[0]}{more}; {remedy}")


def fill(module: nn.Module, weights: Mapping[str, Tensor], *, source: str, keep: Collection[str] = ()) -> None:
    """Copy weights into a module's tensors of the same names, one at a time; those named in `keep` may stay.

    Raises UserError, before anything is changed, as `require_fit` does.
    """
    ours, theirs = module.state_dict(), Weights.of(weights)
    require_fit(ours, theirs, source=source, keep=keep)
    with torch.no_grad():
        for name in theirs:
            ours[name].copy_(theirs[name])


# Reading


def open_weights(path: Path) -> Weights:
    """A weight file: .safetensors, the .json index of a sharded set, or what torch.save wrote.

    Of a training checkpoint the entry `state_dict` is taken. Raises UserError for a file that is damaged, holds
    anything but tensors, or would have to run code to be read.
    """
    if not path.is_file():
        raise UserError(f"weight file {path} does not exist")
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"weight file {path} cannot be read: {error.strerror}; change that or give another") from error
    if path.suffix == ".json":
        return _open_shards(path)
    return _open_safetensors(path) if path.suffix == SUFFIX else _open_pickle(path)


def _open_safetensors(path: Path) -> Weights:
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        specs = {name: spec(one.get_shape(), _DTYPES[one.get_dtype()]) for name, one in slices.items()}
    except (SafetensorError, OSError, KeyError) as error:
        reason = _first_cut_off(path) or str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a weight file ({reason}); download or copy it again") from error
    return Weights(specs, file.get_tensor)


def read_metadata(path: Path) -> dict[str, str]:
    """What the writer of a .safetensors file noted in it; nothing for other files, or damaged ones."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def _first_cut_off(path: Path) -> str | None:
    """What is missing of a truncated .safetensors file, if that is what it is."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100 << 20)))
        room = path.stat().st_size - 8 - length
        cut = [name for name, entry in header.items() if name != "__metadata__" and entry["data_offsets"][1] > room]
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        return None
    return f"it is truncated: {cut[0]} and {len(cut) - 1} more tensors are cut off" if cut else None


def _open_shards(index: Path) -> Weights:
    try:
        places = {str(k): Path(v).name for k, v in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        if any(name.endswith(".json") for name in places.values()):
            raise ValueError("an index of indices")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not the index of a sharded weight file; download or copy it again") from error
    files = {name: open_weights(index.parent / name) for name in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in files[file]:
            raise UserError(f"{index} says that {name} is in {file}, which has no such tensor; download both again")
    return Weights({name: files[file].specs[name] for name, file in places.items()}, lambda n: files[places[n]][n])


def _open_pickle(path: Path) -> Weights:
    try:
        state = _load(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError,
            AttributeError) as error:  # fmt: skip
        raise _unreadable(path, error) from None
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not weights by name; give another file")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path} holds a {type(tensor).__name__} under {name!r}, not a tensor; give another file")
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.dtype} ({tensor.layout}, on {tensor.device})"
            raise UserError(f"{path}: {name} is a tensor of {kind}, which is not read; give plain numbers")
    return Weights.of(state)


def _load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice is to run what we refuse
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # of before torch 1.6: it cannot be mapped


def _unreadable(path: Path, error: Exception) -> UserError:
    if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
        asked = f"{path} is a pickle that asks to run {wanted[1]}, and vdm reads nothing but tensors"
        return UserError(f"{asked}; get the .safetensors version of it")
    reason = (str(error) or "it is empty").splitlines()[0]
    if "weights_only" in str(error):  # torch's advice is to run it
        reason = "it is damaged, or a pickle of more than tensors, and vdm reads nothing but these"
    return UserError(f"{path} cannot be read as a weight file ({reason}); download or copy it again")


# Writing


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file one tensor at a time. Raises OSError.

    One that is there is replaced when the new one is complete: its tensors may be in use, and they are its pages.
    """
    weights = Weights.of(tensors)
    # Wide types first, so that every tensor is aligned; then by name.
    names = sorted(weights, key=lambda name: (-weights.specs[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        meta = weights.specs[name]
        start, end = end, end + math.prod(meta.shape) * meta.dtype.itemsize
        header[name] = {"dtype": _NAMES[meta.dtype], "shape": list(meta.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(f".{path.name}.tmp")
    with unfinished.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor, meta = weights[name].detach(), weights.specs[name]
            assert tensor.shape == meta.shape and tensor.dtype == meta.dtype, name
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    unfinished.replace(path)


def write_pickle(path: Path, state: Mapping[str, Any]) -> None:
    """Write what `torch.load(weights_only=True)` reads, as `write_safetensors` does. Raises OSError."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        torch.save(dict(state), unfinished)
        unfinished.replace(path)
    except RuntimeError as error:  # how torch says that a write fell short: "[enforce fail at inline_container.cc ..."
        raise OSError(f"{path.name} could not be written to its end") from error


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
