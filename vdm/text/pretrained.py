"""Public open_clip weights into our tower."""

from __future__ import annotations

from pathlib import Path

import open_clip

from vdm.errors import UserError
from vdm.text.encoder import TextEncoder
from vdm.weights import Weights, fill, open_weights


def load_open_clip(encoder: TextEncoder, source: str) -> None:
    """Fill the tower from an open_clip weight file, or from "MODEL/TAG", which open_clip downloads and caches.

    The file may hold a whole CLIP model or its text tower alone. Its vision tower, projection and last text layer
    are left out. Raises `UserError` where `source` is neither, or its tensors are of another shape.
    """
    path = _locate(source)
    weights = tower_weights(open_weights(path))
    wanted = encoder.tower.state_dict()
    fill(encoder.tower, weights.renamed(lambda name: name if name in wanted else None), source=str(path))
    encoder.seen_tokens.fill_(True)  # every row of the table was trained, so none may be dropped when it is saved


def _locate(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    model, _, tag = source.partition("/")
    config = open_clip.get_pretrained_cfg(model, tag)
    if path.exists() or not config:
        raise UserError(
            f"text.text_weights: {source} is neither a model folder, nor a file, nor an open_clip MODEL/TAG; "
            "train or download it first, or set it to null"
        )
    if config.get("quick_gelu"):
        raise UserError(f"text.text_weights: {source} has quick_gelu, and this tower has gelu; take a laion2b_* tag")
    try:
        return Path(open_clip.download_pretrained(config))
    except OSError as error:
        raise UserError(f"text.text_weights: {source} cannot be downloaded ({error}); give a file instead") from error


def tower_weights(weights: Weights) -> Weights:
    """The tensors of a CLIP model's text tower, named relative to it; or all of a file that holds a tower alone."""
    bare = weights.renamed(lambda name: name.removeprefix("module."))
    if any(name.startswith("text.") for name in bare):
        return bare.renamed(lambda name: name.removeprefix("text.") if name.startswith("text.") else None)
    return bare.renamed(lambda name: None if name.startswith("visual.") else name)
