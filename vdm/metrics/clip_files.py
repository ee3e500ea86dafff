"""CLIP weight files, and which network they were trained in: the same tensors fit two, quick-GELU and GELU.

OpenAI's networks have quick-GELU, x * sigmoid(1.702 x); LAION's have GELU. A file does not say which, and the wrong one
runs without complaint and gives other numbers. So it must be told by the file's format, by the open_clip_config.json
that lies beside it, by what precision its numbers have, or by the user; where it is not told, the file is refused.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from vdm.errors import UserError, nearest
from vdm.metrics.clip_pixels import OPENAI_MEAN, OPENAI_STD
from vdm.weights import Weights, fill, open_weights

VOCABULARY = 49_408  # of the tokenizer that comes with open_clip
QUICK = "-quickgelu"
GOOD_FILES = "OpenAI's ViT-B-32.pt, or an open_clip_model.safetensors with its open_clip_config.json"
# Names under which a file on the Hugging Face hub is described by the open_clip_config.json beside it.
_DESCRIBED = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_OPENAI_ONLY = ("input_resolution", "context_length", "vocab_size")  # numbers among the tensors of OpenAI's archives
_LINEAR = ("visual.conv1.weight", "visual.transformer.resblocks.0.mlp.c_fc.weight",
           "transformer.resblocks.0.mlp.c_fc.weight")  # fmt: skip
_NOT_LINEAR = "token_embedding.weight"
_VISION_SIZES = ("width", "layers", "patch_size", "image_size")
_TEXT_SIZES = ("width", "layers", "context_length", "vocab_size")


@dataclass(frozen=True)
class ClipNet:
    """A network in float32 and eval mode, its open_clip config's name, and how its pixels are normalised."""

    net: Any  # open_clip.CLIP, which carries no types
    model: str
    quick_gelu: bool
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD


def open_clip_net(path: Path, *, model: str | None = None) -> ClipNet:
    """A CLIP with a ViT from OpenAI's TorchScript archive, or from open_clip's tensors as .safetensors or .pt.

    `model` is the name of an open_clip config, "ViT-B-32" (GELU) or "ViT-B-32-quickgelu", where the file does not tell.
    Raises UserError for any other file, for one that does not fit the model, and where the activation is not told.
    """
    if model is not None and model not in open_clip.list_models():
        close = nearest(model, open_clip.list_models())
        raise UserError(f"open_clip knows no model {model!r}" + (f"; do you mean {close}?" if close else ""))
    if _is_torchscript(path):
        return _open_archive(path, model)
    weights = open_weights(path).renamed(lambda name: name.removeprefix("module."))
    _require_clip(path, weights)
    if config_file := config_beside(path):
        return _described(path, weights, config_file, model)
    name = _choose(path, weights, model)
    bare = weights.renamed(lambda name: None if name in _OPENAI_ONLY else name)
    return _build(path, bare, open_clip.get_model_config(name), name)


def config_beside(path: Path) -> Path | None:
    """The config that describes a weight file, where there is one: it changes what comes of the same weights."""
    config = path.with_name("open_clip_config.json")
    return config if path.name in _DESCRIBED and config.is_file() else None


def _is_torchscript(path: Path) -> bool:
    """Whether it is an archive with code in it; what torch.save writes is an archive too, but without."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False  # open_weights says what is wrong with it, if anything is


def _open_archive(path: Path, model: str | None) -> ClipNet:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.load is deprecated, and OpenAI's files are in no other format
        try:
            tensors = torch.jit.load(path, map_location="cpu").state_dict()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} cannot be read as a TorchScript archive ({reason}); download it again") from error
        if not all(name in tensors for name in (*_OPENAI_ONLY, "visual.proj")):
            raise UserError(f"{path} is a TorchScript archive, but not of OpenAI's CLIP with a ViT; give {GOOD_FILES}")
        weights = Weights.of(tensors)
        _require_clip(path, weights)
        name = _choose(path, weights, model)
        try:
            net = open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
        except (RuntimeError, KeyError, TypeError) as error:  # TypeError is how open_clip trips over a name it misses
            raise UserError(
                f"{path} lacks a tensor of OpenAI's CLIP, or has one too many; download it again"
            ) from error
    return ClipNet(net.eval(), name, quick_gelu=True)


def _require_clip(path: Path, weights: Weights) -> None:
    if any(name.startswith(("vision_model.", "text_model.")) for name in weights):
        raise UserError(f"{path} is a CLIP in transformers' layout, which open_clip does not read; give {GOOD_FILES}")
    needed = (
        *_LINEAR,
        _NOT_LINEAR,
        "positional_embedding",
        "visual.positional_embedding",
        "visual.proj",
        "text_projection",
    )
    if missing := [name for name in needed if name not in weights]:
        raise UserError(
            f"{path} is no CLIP with a ViT in open_clip's layout: it has no {missing[0]}; give {GOOD_FILES}"
        )
    if len(weights.specs["token_embedding.weight"]) != VOCABULARY:
        words = len(weights.specs["token_embedding.weight"])
        raise UserError(f"{path} has a vocabulary of {words} tokens, not CLIP's {VOCABULARY}; give {GOOD_FILES}")


def _choose(path: Path, weights: Weights, model: str | None) -> str:
    """The open_clip config of a file that has none beside it."""
    openai = is_openai(weights)
    fitting = [
        name for name in open_clip.list_models() if _sizes_of(open_clip.get_model_config(name)) == _sizes(weights)
    ]
    if model is not None:
        if _sizes_of(open_clip.get_model_config(model)) != _sizes(weights):
            raise UserError(f"{path} holds a CLIP of other sizes than {model}" + _or_else(fitting))
        if openai and not open_clip.get_model_config(model).get("quick_gelu"):
            raise UserError(f"{path} holds OpenAI's weights, which need quick-GELU; take {model}{QUICK}, not {model}")
        return model
    if openai:
        fitting = [name for name in fitting if open_clip.get_model_config(name).get("quick_gelu")]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise UserError(f"{path} holds a CLIP of a size that open_clip has no model of; give {GOOD_FILES}")
    raise UserError(
        f"{path} fits {' and '.join(fitting)}, which differ in their activation, and does not say which; name the "
        f"model, or call the file {_DESCRIBED[0]} and put the open_clip_config.json of its makers beside it"
    )


def _or_else(fitting: list[str]) -> str:
    return f"; it fits {' and '.join(fitting)}" if fitting else f"; give {GOOD_FILES}"


def is_openai(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are OpenAI's numbers: linear layers in float16, also where stored in float32, and the tokens not.

    Their networks were trained so; LAION's are float32 all through, and a file that was rounded is rounded all through.
    """
    if any(name in weights for name in _OPENAI_ONLY):
        return True
    return all(_is_half(weights[name]) for name in _LINEAR) and not _is_half(weights[_NOT_LINEAR])


def _is_half(tensor: Tensor) -> bool:
    return torch.equal(tensor.float(), tensor.half().float())


def _sizes(weights: Weights) -> tuple[int, ...]:
    """The sizes that tell one open_clip model from another, as they are in a file."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.specs.items()}
    patch = shapes["visual.conv1.weight"][-1]
    side = round((shapes["visual.positional_embedding"][0] - 1) ** 0.5) * patch
    vision, text = (
        len({name.split(".resblocks.")[1].split(".")[0] for name in shapes if name.startswith(f"{tower}resblocks.")})
        for tower in ("visual.transformer.", "transformer.")
    )
    context, width = shapes["positional_embedding"]
    tower = (shapes["visual.conv1.weight"][0], vision, patch, side)
    return (shapes["visual.proj"][1], *tower, width, text, context, shapes["token_embedding.weight"][0])


def _sizes_of(config: Mapping[str, Any]) -> tuple[object, ...]:
    """The same of a config; None where it has no such entry, as for towers of other kinds."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    return (config["embed_dim"], *map(vision.get, _VISION_SIZES), *map(text.get, _TEXT_SIZES))


def _described(path: Path, weights: Weights, config_file: Path, model: str | None) -> ClipNet:
    try:
        described = json.loads(config_file.read_text(encoding="utf-8"))
        config, pixels = described["model_cfg"], described.get("preprocess_cfg", {})
        mean, std = (tuple(float(v) for v in pixels.get(k, d)) for k, d in (("mean", OPENAI_MEAN), ("std", OPENAI_STD)))
        fits = _sizes_of(config) == _sizes(weights)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{config_file} is not a config of open_clip's; download it again") from error
    if not fits:
        raise UserError(f"{config_file} describes a CLIP of other sizes than {path} holds; download both again")
    quick = bool(config.get("quick_gelu"))
    if is_openai(weights) and not quick:
        raise UserError(f"{path} holds OpenAI's weights, but {config_file} lacks quick_gelu; download both again")
    names = [name for name in open_clip.list_models() if _same_net(open_clip.get_model_config(name), config)]
    if model is not None and model not in names:
        raise UserError(f"{config_file} describes another CLIP than {model}; leave the model's name out")
    return _build(path, weights, config, names[0] if names else config_file.name, mean=mean, std=std)


def _same_net(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return _sizes_of(one) == _sizes_of(other) and bool(one.get("quick_gelu")) == bool(other.get("quick_gelu"))


def _build(
    path: Path,
    weights: Weights,
    config: Mapping[str, Any],
    name: str,
    *,
    mean: tuple[float, ...] = OPENAI_MEAN,
    std: tuple[float, ...] = OPENAI_STD,
) -> ClipNet:
    try:
        net = open_clip.CLIP(**{key: value for key, value in config.items() if key != "custom_text"})
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: {name} is a kind of CLIP that is not read here ({error}); give {GOOD_FILES}"
        ) from error
    fill(net, weights, source=str(path))
    return ClipNet(net.eval(), name, quick_gelu=bool(config.get("quick_gelu")), mean=mean, std=std)
