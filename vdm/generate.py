"""`sample.py`: prompts to mp4 files, their records in samples.jsonl, and one contact sheet."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from vdm.components import SHIPPED
from vdm.data.sheet import contact_sheet
from vdm.data.video import to_uint8, write_video
from vdm.errors import UserError
from vdm.pipeline import TextToVideo

PROMPTS = (
    "pushing a red ball from left to right",
    "pulling a blue box from right to left",
    "picking a green cup up",
    "moving a yellow bottle towards the camera",
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Request:
    """What to make. None leaves a choice to the checkpoint's config."""

    prompts: tuple[str, ...]
    checkpoint: Path | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    sampler: str | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    seed: int = 0
    num_videos_per_prompt: int = 1
    batch_size: int = 4
    lora_path: Path | None = None
    lora_scale: float = 1.0
    output_dir: Path = Path("results/samples")
    device: str | None = None
    dtype: str = "fp32"


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line; blank lines do not count. Raises `UserError` where there is none."""
    try:
        prompts = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompt file {path} cannot be read ({error}); give a UTF-8 text file, one prompt a line"
        ) from error
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt; write one a line")
    return prompts


def generate(request: Request) -> list[Path]:
    """Make and write all clips of a request; returns their files. Raises `UserError` before anything is written."""
    if not request.prompts or not all(prompt.strip() for prompt in request.prompts):
        raise UserError("the list of prompts is empty or holds an empty one; give --prompt TEXT or --prompt_file FILE")
    for name in ("num_videos_per_prompt", "batch_size"):
        if getattr(request, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(request, name)}")
    if request.eta and request.sampler == "dpmpp":
        raise UserError("--eta is not for --sampler dpmpp, which is deterministic; leave it out, or use ddim")
    if not 0 <= request.seed < 2**63:
        raise UserError(f"--seed must be at least 0 and below 2**63, got {request.seed}")
    _require_writable(request.output_dir)
    pipe = TextToVideo.from_pretrained(request.checkpoint)
    if request.lora_path is not None:
        count = pipe.load_lora(request.lora_path, scale=request.lora_scale)
        print(f"merged a LoRA of {count} layers from {request.lora_path}")
    pipe.to(pick_device(request.device), DTYPES[request.dtype])
    jobs = [prompt for prompt in request.prompts for _ in range(request.num_videos_per_prompt)]
    return _write_all(pipe, request, jobs)


def _write_all(pipe: TextToVideo, request: Request, jobs: Sequence[str]) -> list[Path]:
    defaults = pipe.config.sampling
    fps = defaults.sampling_fps if request.fps is None else request.fps
    if not 0 < fps <= 1000:
        raise UserError(f"--fps must be above 0 and at most 1000, got {fps}")
    files: list[Path] = []
    clips, records, written = [], [], []
    with ThreadPoolExecutor(max_workers=1) as writer:  # encodes while the next batch is sampled
        for first in tqdm(range(0, len(jobs), request.batch_size), desc="sampling", unit="batch"):
            prompts = jobs[first : first + request.batch_size]
            seeds = [request.seed + first + i for i in range(len(prompts))]
            for prompt, seed, clip in zip(prompts, seeds, _sampled(pipe, request, prompts, seeds), strict=True):
                frames = to_uint8(clip.transpose(0, 1).float().cpu() * 2.0 - 1.0)
                name = f"{len(files):05d}-{slug(prompt)}.mp4"
                written.append(writer.submit(write_video, request.output_dir / name, frames, fps=fps))
                files.append(request.output_dir / name)
                clips.append(frames)
                made = {"file": name, "prompt": prompt, "seed": seed}
                records.append({**made, **_record(pipe, request, frames.shape, fps)})
            for one in written:
                if one.done():
                    one.result()  # raises what writing raised
    for one in written:
        one.result()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    _replace(request.output_dir / "samples.jsonl", lines)
    contact_sheet(request.output_dir / "contact_sheet.png", clips, captions=list(jobs))
    return files


def _sampled(pipe: TextToVideo, request: Request, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
    """(B,T,3,H,W) in [0,1]."""
    video = pipe(
        prompts,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps,
        num_frames=request.num_frames,
        height=request.height,
        width=request.width,
        guidance_scale=request.guidance_scale,
        eta=request.eta,
        sampler=request.sampler,  # type: ignore[arg-type]
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).frames
    return torch.as_tensor(video)


def _record(pipe: TextToVideo, request: Request, shape: tuple[int, ...], fps: float) -> dict[str, object]:
    """What a clip was made with, all defaults spelled out."""
    defaults = pipe.config.sampling
    chosen = {
        "negative_prompt": (request.negative_prompt, defaults.negative_prompt),
        "steps": (request.steps, defaults.num_inference_steps),
        "sampler": (request.sampler, defaults.sampler),
        "eta": (request.eta, defaults.eta),
        "guidance_scale": (request.guidance_scale, defaults.guidance_scale),
    }
    record = {key: default if given is None else given for key, (given, default) in chosen.items()}
    if request.lora_path is not None:
        record |= {"lora_path": str(request.lora_path), "lora_scale": request.lora_scale}
    size = {"num_frames": shape[0], "height": shape[1], "width": shape[2], "fps": fps}
    return {**record, **size, "checkpoint": str(request.checkpoint or SHIPPED.name)}


def slug(prompt: str) -> str:
    """The prompt as part of a file name: lower case, words joined by hyphens, at most 60 characters."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "clip"


def pick_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def _require_writable(folder: Path) -> None:
    """Create the folder and try it, before minutes of sampling are spent on it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"output folder {folder} cannot be written ({error.strerror}); choose another --output_dir"
        ) from error


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another --output_dir") from error
