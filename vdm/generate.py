"""`sample.py`: prompts to mp4 files, their records in samples.jsonl, and one contact sheet."""

from __future__ import annotations

import json
import re
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from vdm.components import SHIPPED
from vdm.config import override
from vdm.data.sheet import contact_sheet
from vdm.data.transforms import Crop, Frames
from vdm.data.video import read_clip, to_uint8, write_video
from vdm.errors import Failure, UserError, out_of_memory
from vdm.files import replacing
from vdm.pipeline import TextToVideo

PROMPTS = (
    "pushing a red ball from left to right",
    "pulling a blue box from right to left",
    "picking a green cup up",
    "moving a yellow bottle towards the camera",
)
SHEET_CLIPS = 64  # the first ones, for a picture that can be looked at
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
    init_video: Path | None = None  # a video, or a picture, which then stands still
    strength: float = 0.6
    output_dir: Path = Path("results/samples")
    device: str | None = None
    dtype: str = "fp32"
    overrides: tuple[str, ...] = ()  # sampling.key=value, in place of what the checkpoint's config says


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
    if not 0 <= request.seed < 2**63:
        raise UserError(f"--seed must be at least 0 and below 2**63, got {request.seed}")
    require_of_sampling(request.overrides)
    _require_writable(request.output_dir)
    pipe = TextToVideo.from_pretrained(request.checkpoint)
    pipe.config = override(pipe.config, request.overrides)
    if request.eta is None and any(one.strip().startswith("sampling.eta") for one in request.overrides):
        request = replace(request, eta=pipe.config.sampling.eta)  # which is refused like the flag where it does nothing
    if request.lora_path is not None:
        count = pipe.load_lora(request.lora_path, scale=request.lora_scale)
        print(f"merged a LoRA of {count} layers from {request.lora_path}")
    jobs = [prompt for prompt in request.prompts for _ in range(request.num_videos_per_prompt)]
    device = pick_device(request.device)
    try:
        pipe.to(device, DTYPES[request.dtype])
        return _write_all(pipe, request, jobs)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise Failure(
            f"the memory of {device} is too small for this; sample with --batch_size 1, --dtype bf16, "
            "sampling.guidance_at_once=false or sampling.vae_tile=32, or make smaller or shorter clips"
        ) from error


def _write_all(pipe: TextToVideo, request: Request, jobs: Sequence[str]) -> list[Path]:
    defaults, folder = pipe.config.sampling, request.output_dir
    fps = defaults.sampling_fps if request.fps is None else request.fps
    if not 0 < fps <= 1000:
        raise UserError(f"--fps must be above 0 and at most 1000, got {fps}")
    start = _start(pipe, request, fps)
    files: list[Path] = []
    shown: list[Frames] = []
    records = _Records(folder / "samples.jsonl")
    # Frames are encoded while the next batch is sampled; however it ends, what is written is in the records.
    with closing(records), ThreadPoolExecutor(max_workers=1) as writer:
        for first in tqdm(range(0, len(jobs), request.batch_size), desc="sampling", unit="batch"):
            prompts = jobs[first : first + request.batch_size]
            seeds = [request.seed + first + i for i in range(len(prompts))]
            video = _sampled(pipe, request, prompts, seeds, start)
            records.update(wait=False)
            for prompt, seed, clip in zip(prompts, seeds, video, strict=True):
                frames = to_uint8(clip.transpose(0, 1).float() * 2.0 - 1.0)
                files.append(folder / f"{len(files):05d}-{slug(prompt)}.mp4")
                made = {"file": files[-1].name, "prompt": prompt, "seed": seed}
                job = writer.submit(write_video, files[-1], frames, fps=fps)
                records.expect(job, {**made, **_record(pipe, request, frames.shape, fps)})
                shown += [frames] if len(shown) < SHEET_CLIPS else []
    contact_sheet(folder / "contact_sheet.png", shown, captions=list(jobs[: len(shown)]))
    return files


class _Records:
    """samples.jsonl: from the first update on, a line for every clip of this request that is written, and no other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[str] | None = None
        self._expected: deque[tuple[Future[None], Mapping[str, object]]] = deque()

    def expect(self, job: Future[None], record: Mapping[str, object]) -> None:
        """A clip that `job` writes."""
        self._expected.append((job, record))

    def update(self, *, wait: bool) -> None:
        """Take in the clips that are written; raises what writing the first of the others raised."""
        lines = self._lines = self._lines or []
        errors: list[BaseException] = []
        while self._expected and (wait or self._expected[0][0].done()):
            job, record = self._expected.popleft()
            if (error := job.exception()) is None:
                lines.append(json.dumps(record) + "\n")
            else:
                errors.append(error)
        with replacing(self.path, remedy="choose another --output_dir") as file:
            file.write_text("".join(lines), encoding="utf-8")
        for error in errors:
            raise error

    def close(self) -> None:
        """Wait for all clips; a request of which none was sampled leaves an earlier one's records."""
        if self._lines is not None:
            self.update(wait=True)


def _start(pipe: TextToVideo, request: Request, fps: float) -> Frames | None:
    """The clip to start from, in the size that is wanted."""
    if request.init_video is None:
        return None
    sizes = {
        name: getattr(pipe.config.sampling, name) if (given := getattr(request, name)) is None else given
        for name in ("num_frames", "height", "width")
    }
    if min(sizes.values()) < 1:
        raise UserError(f"--num_frames, --height and --width must be 1 or more, got {sizes}")
    crop = Crop(sizes["height"], sizes["width"])
    return read_clip(request.init_video, fps=fps, num_frames=sizes["num_frames"], start=0.0, crop=crop)


def _sampled(
    pipe: TextToVideo, request: Request, prompts: Sequence[str], seeds: Sequence[int], start: Frames | None
) -> torch.Tensor:
    """(B,T,3,H,W) in [0,1]."""
    video = pipe(
        prompts,
        video=start,
        strength=request.strength,
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
    if request.init_video is not None:
        record |= {"init_video": str(request.init_video), "strength": request.strength}
    if request.overrides:
        record |= {"overrides": list(request.overrides)}
    size = {"num_frames": shape[0], "height": shape[1], "width": shape[2], "fps": fps}
    return {**record, **size, "checkpoint": str(request.checkpoint or SHIPPED.name)}


def slug(prompt: str) -> str:
    """The prompt as part of a file name: lower case, words joined by hyphens, at most 60 characters."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "clip"


def require_of_sampling(overrides: Sequence[str]) -> None:
    """Raises UserError where one is of another section, or none."""
    if others := [one for one in overrides if not one.strip().startswith("sampling.")]:
        raise UserError(
            f"{others[0]!r} is no setting of sampling; write what is one as sampling.key=value, and a prompt, in "
            "quotes, after --prompt"
        )


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
