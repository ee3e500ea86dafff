"""A diffusers folder of TextToVideoSDPipeline: model_index.json, and a folder for each part.

Read with any scheduler whose noise schedule is one of ours; written with DDIMScheduler, as the public model has it.
`StableDiffusionPipeline` with heads of one width (Stable Diffusion 2) is read as a warm start: an image model whose
temporal layers are new and change nothing yet.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vdm.config import Config
from vdm.diffusion import SamplingConfig
from vdm.errors import UserError
from vdm.interop.diffusers_json import (
    INDEX,
    SAMPLERS,
    VIDEO_PIPELINE,
    folder_json,
    read_schedule,
    read_text,
    read_unet,
    read_vae,
)
from vdm.interop.ldm import tower_tensors
from vdm.interop.links import NOTHING, Allowed, Report, to_ours, to_theirs
from vdm.interop.model import (
    Part,
    StoredModel,
    config_of,
    making_sense_of,
    need,
    read_json,
    text_state,
    with_note,
    write_json,
    write_notes,
)
from vdm.interop.names import text_links, unet_links, unet_tensors, vae_links, vae_tensors
from vdm.interop.tokenizer import read_pad_token, write_tokenizer
from vdm.weights import open_weights, write_safetensors

VIDEO = (VIDEO_PIPELINE, "VideoToVideoSDPipeline")
IMAGE = ("StableDiffusionPipeline",)
FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder"}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text": "model"}
# Autoencoders of before diffusers 0.17 have these names in their attention.
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def open_diffusers(path: Path, *, variant: str | None = None, allowed: Allowed = NOTHING) -> StoredModel:
    """A diffusers folder. Raises `UserError` where it holds another kind of model, or one that ours cannot be."""
    kind = need(read_json(path / INDEX), "_class_name", path / INDEX)
    if kind not in (*VIDEO, *IMAGE):
        raise UserError(
            f"{path} holds a {kind}, which is another model; this one reads {VIDEO[0]} folders, and "
            f"{IMAGE[0]} folders of Stable Diffusion 2 as a warm start"
        )
    files = {name: path / name / "config.json" for name in FOLDERS.values()}
    scheduler = path / "scheduler" / "scheduler_config.json"
    trees, schedule = {name: read_json(file) for name, file in files.items()}, read_json(scheduler)
    named = need(schedule, "_class_name", scheduler)
    with making_sense_of(files["unet"]):
        unet = read_unet(trees["unet"], files["unet"], video=kind in VIDEO)
        sample = trees["unet"].get("sample_size") or 32
        height, width = sample if isinstance(sample, list) else (sample, sample)
    with making_sense_of(files["vae"]):
        vae = read_vae(trees["vae"], files["vae"])
        sampling = SamplingConfig(height=height * vae.factor, width=width * vae.factor)
        if named == "DDPMScheduler":
            sampling = replace(sampling, sampler="ddpm")
    with making_sense_of(files["text_encoder"]):
        text = read_text(trees["text_encoder"], files["text_encoder"], read_pad_token(path / "tokenizer"))
    with making_sense_of(scheduler):
        diffusion = read_schedule(schedule, scheduler)
    with making_sense_of(path):
        derived = config_of(path, model=unet, vae=vae, text=text, diffusion=diffusion, sampling=sampling)
    config, remarks = with_note(path, derived, folder_json)
    kept = f"{named} is not there: its noise schedule is kept, and sampling is by ddim"
    return StoredModel(
        "diffusers" if kind in VIDEO else "stable-diffusion",
        path,
        config,
        {part: lambda part=part: _open_part(path, part, config, variant, allowed, kind in VIDEO) for part in FOLDERS},  # type: ignore[misc]
        remarks if named in SAMPLERS else (*remarks, kept),
    )


def _open_part(path: Path, part: str, config: Config, variant: str | None, allowed: Allowed, video: bool) -> Part:
    folder = path / FOLDERS[part]
    file = _weight_file(folder, STEMS[part], variant)
    theirs, source = open_weights(file), str(file)
    if part == "unet":
        links, ours = unet_links(config.model, "diffusers"), unet_tensors(config.model)
        if not video:
            spatial = {link.ours for link in unet_links(config.model, "ldm")}
            links = [link for link in links if link.ours in spatial]
        weights, report = to_ours(part, links, theirs, ours, source=source, allowed=allowed)
    elif part == "vae":
        theirs = theirs.renamed(_current_name)
        vae = vae_tensors(config.vae)
        weights, report = to_ours(part, vae_links(config.vae, "diffusers"), theirs, vae, source=source, allowed=allowed)
    else:
        theirs = theirs.renamed(lambda name: name if name.startswith("text_model.") else f"text_model.{name}")
        tower = tower_tensors(config.text)
        weights, report = to_ours(
            part, text_links(config.text, "transformers"), theirs, tower, source=source, allowed=allowed,
            left_out=lambda name: name.endswith("position_ids"),
        )  # fmt: skip
        weights = text_state(weights, path)
    return Part(weights, _with_shards(file), report)


def _current_name(name: str) -> str:
    for old, new in _OLD_ATTENTION.items():
        name = name.replace(old, new) if ".attentions." in name else name
    return name


def _weight_file(folder: Path, stem: str, variant: str | None) -> Path:
    """The weight file to read: safetensors rather than pickles, full precision unless a variant is asked for."""
    pickle = {"model": "pytorch_model"}.get(stem, stem)  # transformers' name for a pickle
    for precision in [variant] if variant else [None, "fp16"]:
        dot = f".{precision}" if precision else ""
        for name in (
            f"{stem}{dot}.safetensors", f"{stem}.safetensors.index{dot}.json", f"{stem}.safetensors{dot}.index.json",
            f"{pickle}{dot}.bin", f"{pickle}.bin.index{dot}.json", f"{pickle}.bin{dot}.index.json",
        ):  # fmt: skip
            if (folder / name).is_file():
                return folder / name
    wanted = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    there = ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"
    raise UserError(f"{folder} has no {wanted} or .bin, but {there}; download the folder again")


def _with_shards(file: Path) -> tuple[Path, ...]:
    if file.suffix != ".json":
        return (file,)
    return tuple(file.parent / name for name in sorted(set(read_json(file)["weight_map"].values())))


# Writing


def write_diffusers(model: StoredModel, folder: Path, *, dtype: torch.dtype | None = None) -> list[Report]:
    """Write a folder that `diffusers.DiffusionPipeline.from_pretrained` opens, into `folder`, which is there and empty.

    Raises `UserError` where the model has something that diffusers' cannot have.
    """
    config = model.config
    trees = folder_json(config)
    write_json(folder / INDEX, trees.pop(INDEX))
    write_notes(folder, config, model.open("text").weights.cast(dtype))
    for name, tree in trees.items():
        (folder / name).mkdir()
        write_json(folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json"), tree)
    text = config.text
    write_tokenizer(folder / "tokenizer", context_length=text.context_length, pad_token_id=text.pad_token_id)
    links = {
        "unet": unet_links(config.model, "diffusers"),
        "vae": vae_links(config.vae, "diffusers"),
        "text": text_links(text, "transformers"),
    }
    reports = []
    for part, link in links.items():
        weights, report = to_theirs(part, link, model.open(part).weights.cast(dtype))
        write_safetensors(folder / FOLDERS[part] / f"{STEMS[part]}.safetensors", weights, metadata={"format": "pt"})
        reports.append(report)
    return reports
