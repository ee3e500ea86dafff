"""Which layout a folder has, and our own layout as one of them."""

from __future__ import annotations

from pathlib import Path

from vdm.checkpoint import ADAPTER, CONFIG, MANIFEST, checked_file, load_weights, read_manifest
from vdm.config import Config, load
from vdm.errors import UserError
from vdm.interop.diffusers import open_diffusers
from vdm.interop.diffusers_json import INDEX
from vdm.interop.ldm import open_stable_diffusion
from vdm.interop.links import NOTHING, Allowed
from vdm.interop.model import PARTS, Part, StoredModel, read_json
from vdm.interop.modelscope import CONFIGURATION, open_modelscope
from vdm.interop.names import text_tensors, unet_tensors, vae_tensors
from vdm.text.encoder import unpack_vocabulary
from vdm.weights import SUFFIX, require_fit

_SECTIONS = {"unet": "model", "vae": "vae", "text": "text"}


def open_model(path: str | Path, *, variant: str | None = None, allowed: Allowed = NOTHING) -> StoredModel:
    """A model folder in our layout, diffusers' or the original's, whichever it is, or Stable Diffusion 2 in one file.

    No weights are read yet. `variant` is diffusers' ("fp16"). Raises `UserError` where it is none of these, or another
    model.
    """
    path = Path(path)
    try:
        return _open(path, variant, allowed)
    except OSError as error:  # a folder that may not be looked into
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}; change that or give another") from error


def _open(path: Path, variant: str | None, allowed: Allowed) -> StoredModel:
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist")
    if path.is_file() and path.suffix not in (SUFFIX, ".ckpt"):
        raise UserError(f"checkpoint {path} is not a folder; give the folder that the model's files are in")
    if path.is_file():
        return open_stable_diffusion(path, allowed=allowed)
    if (path / INDEX).is_file():
        return open_diffusers(path, variant=variant, allowed=allowed)
    if variant is not None:
        raise UserError(f"{path} is no diffusers folder, so it has no variant {variant}; leave it out")
    if (path / CONFIGURATION).is_file():
        return open_modelscope(path, allowed=allowed)
    if (path / ADAPTER).is_file():
        base = read_json(path / ADAPTER).get("base_model_name_or_path") or "BASE"
        raise UserError(
            f"{path} is a LoRA, not a whole model; give the model that it changes, and it besides: "
            f"sample.py --checkpoint {base} --lora_path {path}"
        )
    return _open_ours(path)


def _open_ours(path: Path) -> StoredModel:
    if not (path / MANIFEST).is_file() and (path / "unet").is_dir():
        raise UserError(f"{path} has no {INDEX}: a diffusers folder is not complete without it; download it again")
    held = read_manifest(path).parts
    config = load(checked_file(path, CONFIG))
    return StoredModel(
        "vdm",
        path,
        config,
        {part: lambda part=part: _open_part(path, part, config) for part in PARTS if part in held},  # type: ignore[misc]
    )


def _open_part(path: Path, part: str, config: Config) -> Part:
    """The averaged weights of a part where the folder has them."""
    name = f"{part}.ema" if f"{part}.ema" in read_manifest(path).parts else part
    weights, file = load_weights(path, name), path / f"{name}{SUFFIX}"
    if part == "text":
        weights = unpack_vocabulary(weights)
    tensors = {"unet": unet_tensors, "vae": vae_tensors, "text": text_tensors}
    wanted = tensors[part](getattr(config, _SECTIONS[part]))  # type: ignore[operator]
    require_fit(wanted, weights, source=str(file))
    return Part(weights, (file,))
