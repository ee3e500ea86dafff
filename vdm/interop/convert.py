"""`vdm convert`: a model from one layout into another, tensor by tensor, with a report of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from vdm.checkpoint import save_checkpoint, written_whole
from vdm.components import build_components, without_sources
from vdm.config import Config, to_yaml
from vdm.errors import UserError
from vdm.interop.diffusers import write_diffusers
from vdm.interop.links import NOTHING, Allowed, Report
from vdm.interop.model import PARTS, Part, StoredModel
from vdm.interop.modelscope import remarks_on_modelscope, write_modelscope
from vdm.interop.store import open_model
from vdm.text.encoder import TOKEN_TABLE, pack_vocabulary
from vdm.weights import Weights, sha256

Layout = Literal["vdm", "diffusers", "modelscope"]
WEIGHT_FILES = (".safetensors", ".pth", ".bin")


def convert(
    source: Path,
    target: Path,
    *,
    to: Layout,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    allowed: Allowed = NOTHING,
    say: Callable[[str], None] = print,
) -> None:
    """Write the model in the folder `source` into the new folder `target`, its floats as `dtype` (None: as they are).

    Every tensor is accounted for, line by line through `say`. One tensor is in memory at a time, and where pickles are
    written, one part. What may be missing, and temporal layers that an image model cannot have, are new, from the
    config's seed. Raises `UserError`, and leaves nothing behind, where the two layouts cannot hold the same model.
    """
    _require_new(target, source)
    stored = open_model(source, variant=variant, allowed=allowed)
    lacking = [part for part in PARTS if part not in stored.parts]
    if lacking and to != "vdm":
        raise UserError(f"{source} holds no weights of {', '.join(lacking)}; a {to} folder needs all of {PARTS}")
    config = without_sources(stored.config)
    say(f"{source}: {stored.layout} layout")
    for remark in (*stored.remarks, *_remarks_on(config, to)):
        say(f"note: {remark}")
    held = {part: stored.open(part) for part in stored.parts}
    for part in held.values():
        _say_read(part, say)
    model = replace(stored, config=config, parts=_completed(config, held))
    for report in _write(model, target, to, dtype):
        _say(report, say)
    for file in sorted(target.rglob("*")):
        if file.suffix in WEIGHT_FILES:
            say(f"wrote {sha256(file)} {file}")


def _remarks_on(config: Config, to: Layout) -> tuple[str, ...]:
    """What the code that reads a layout will do otherwise than we do."""
    alike = config.training.frame_noise_correlation
    return (
        *(remarks_on_modelscope(config) if to == "modelscope" else ()),
        *(
            (
                f"the model was trained with training.frame_noise_correlation={alike}, and the code for {to} folders "
                "starts from noise that is independent from frame to frame; vdm does not",
            )
            if alike and to != "vdm"
            else ()
        ),
    )


def _require_new(target: Path, source: Path) -> None:
    try:
        if target.is_symlink() or (target.exists() and not _is_empty(target)):
            raise UserError(f"{target} is there already; choose another folder or remove it")
    except OSError as error:
        raise UserError(f"{target} cannot be looked at: {error.strerror}; choose another folder") from error
    if source.resolve() in target.resolve().parents:
        raise UserError(f"{target} is inside {source}, which is left as it is; choose another folder")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _say_read(part: Part, say: Callable[[str], None]) -> None:
    for file in part.files:
        say(f"read {sha256(file)} {file}")
    if part.report is not None:
        _say(part.report, say)


def _say(report: Report, say: Callable[[str], None]) -> None:
    for line in report.lines():
        say(line)


def _completed(config: Config, held: dict[str, Part]) -> dict[str, Callable[[], Part]]:
    """Parts in full: tensors that the source does not have are drawn as for a new model."""
    absent = {
        name: part.report.fresh + part.report.missing for name, part in held.items() if part.report is not None
    }  # fmt: skip
    if not any(absent.values()):
        return {name: lambda part=part: part for name, part in held.items()}  # type: ignore[misc]
    modules = build_components(config).modules()

    def full(name: str) -> Part:
        weights = held[name].weights
        state = {key: tensor for key, tensor in modules[name].state_dict().items() if key not in weights}
        like = next((spec.dtype for spec in weights.specs.values()), None)
        return replace(held[name], weights=weights.updated(Weights.of(state).cast(like)))

    return {name: lambda name=name: full(name) for name in held}  # type: ignore[misc]


def _write(model: StoredModel, target: Path, to: Layout, dtype: torch.dtype | None) -> list[Report]:
    if to == "vdm":
        weights = {name: model.open(name).weights.cast(dtype) for name in model.parts}
        if "text" in weights:
            weights["text"] = _packed(weights["text"])
        info = {"converted_from": model.layout}
        save_checkpoint(target, config_yaml=to_yaml(model.config), weights=weights, info=info)
        return []
    write = write_diffusers if to == "diffusers" else write_modelscope
    with written_whole(target, replaces="model folder", may_replace=_is_empty) as folder:
        return write(model, folder, dtype=dtype)


def _packed(weights: Weights) -> Weights:
    """Packed where that loses nothing: where all tokens that were not seen share one row."""
    rows = weights[TOKEN_TABLE][~weights["seen_tokens"]]
    return pack_vocabulary(weights, shared=rows[0]) if len(rows) and (rows == rows[0]).all() else weights
