"""Public open_clip weights into our tower."""

from __future__ import annotations

import pickle
from pathlib import Path

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vdm.errors import UserError
from vdm.text.encoder import TextEncoder


def load_open_clip(encoder: TextEncoder, source: str) -> None:
    """Fill the tower from an open_clip weight file, or from "MODEL/TAG", which open_clip downloads and caches.

    The file may hold a whole CLIP model or its text tower alone. Its vision tower, projection and last text layer
    are left out. Raises `UserError` where `source` is neither, or its tensors are of another shape.
    """
    state = _text_state(_read(_locate(source)))
    wanted = encoder.tower.state_dict()
    for name, tensor in wanted.items():
        if name not in state or state[name].shape != tensor.shape:
            found = tuple(state[name].shape) if name in state else "nothing"
            raise UserError(f"{source} does not fit the text tower: {name} is {found}, not {tuple(tensor.shape)}")
    encoder.tower.load_state_dict({name: state[name] for name in wanted})
    encoder.seen_tokens.fill_(True)  # every row of the table was trained, so none may be dropped when it is saved


def _locate(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    model, _, tag = source.partition("/")
    config = open_clip.get_pretrained_cfg(model, tag)
    if path.exists() or not config:
        raise UserError(
            f"text.text_weights: {source} is neither a checkpoint folder, nor a file, nor an open_clip MODEL/TAG; "
            "train or download it first, or set it to null"
        )
    try:
        return Path(open_clip.download_pretrained(config))
    except OSError as error:
        raise UserError(f"text.text_weights: {source} cannot be downloaded ({error}); give a file instead") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error) or "it is empty").splitlines()[0]
        raise UserError(f"{path} cannot be read as a weight file ({reason}); download it again") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not weights by name; give another file")
    return state


def _text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names relative to the tower: without the wrappers' prefixes, and without the vision tower's tensors."""
    names = {name: name.removeprefix("module.") for name in state}
    if any(name.startswith("text.") for name in names.values()):
        return {new.removeprefix("text."): state[old] for old, new in names.items() if new.startswith("text.")}
    return {new: state[old] for old, new in names.items() if not new.startswith("visual.")}
