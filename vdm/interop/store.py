"""Which layout a folder has, and our own layout as one of them."""

from __future__ import annotations

from pathlib import Path

from vdm.checkpoint import CONFIG, MANIFEST, load_weights, read_manifest
from vdm.config import load
from vdm.errors import UserError
from vdm.interop.diffusers import open_diffusers
from vdm.interop.diffusers_json import INDEX
from vdm.interop.ldm import open_stable_diffusion
from vdm.interop.links import NOTHING, Allowed
from vdm.interop.model import PARTS, Part, StoredModel
from vdm.interop.modelscope import CONFIGURATION, open_modelscope
from vdm.text.encoder import unpack_vocabulary
from vdm.weights import SUFFIX


def open_model(path: str | Path, *, variant: str | None = None, allowed: Allowed = NOTHING) -> StoredModel:
    """A model folder in our layout, diffusers' or the original's, whichever it is, or Stable Diffusion 2 in one file.

    No weights are read yet. `variant` is diffusers' ("fp16"). Raises `UserError` where it is none of these, or another
    model.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist")
    if path.is_file() and path.suffix not in (SUFFIX, ".ckpt"):
        raise UserError(f"checkpoint {path} is not a folder; give the folder that the model's files are in")
    try:
        if path.is_file():
            return open_stable_diffusion(path, allowed=allowed)
        if (path / INDEX).is_file():
            return open_diffusers(path, variant=variant, allowed=allowed)
        if variant is not None:
            raise UserError(f"{path} is no diffusers folder, so it has no variant {variant}; leave it out")
        if (path / CONFIGURATION).is_file():
            return open_modelscope(path, allowed=allowed)
        return _open_ours(path)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:  # JSON of another shape
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"the settings in {path} make no sense ({reason}); copy or download it again") from error


def _open_ours(path: Path) -> StoredModel:
    if not (path / MANIFEST).is_file() and (path / "unet").is_dir():
        raise UserError(f"{path} has no {INDEX}: a diffusers folder is not complete without it; download it again")
    held = read_manifest(path).parts
    return StoredModel(
        "vdm",
        path,
        load(path / CONFIG),
        {part: lambda part=part: _open_part(path, part) for part in PARTS if part in held},  # type: ignore[misc]
    )


def _open_part(path: Path, part: str) -> Part:
    """The averaged weights of a part where the folder has them."""
    name = f"{part}.ema" if f"{part}.ema" in read_manifest(path).parts else part
    weights = load_weights(path, name)
    return Part(unpack_vocabulary(weights) if part == "text" else weights, (path / f"{name}{SUFFIX}",))
