"""The two sides of an evaluation: a sample folder and a reference, listed undecoded and read a clip at a time."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vdm.data.find import find_clips, guess_format
from vdm.data.packed import File, Packed
from vdm.data.ssv2 import VIDEO_EXTENSIONS, ClipFile, NoFiles, NoSuchSplit, Split
from vdm.data.transforms import Crop, Frames, resize_crop
from vdm.data.video import ShortClip, UnreadableClip, Window, read_window
from vdm.errors import UserError
from vdm.files import in_words, is_file, names_in

MOST_REFERENCE = 2048  # clips; what FVD is mostly reported with
SLOWEST = 0.9  # of the frame rate of those generated that a reference clip may have
SAMPLES = "samples.jsonl"
FASTEST = 1000  # frames a second
MOST_PIXELS = 2**30  # of all frames of a clip: 500 of 1920x1080
FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "file": str, "prompt": str, "seed": int, "num_frames": int, "height": int, "width": int, "fps": (int, float),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What all clips of both sides have in common once they are read."""

    num_frames: int
    fps: float
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames} frames of {self.width}x{self.height} at {self.fps:g} fps"


@dataclass(frozen=True)
class Clip:
    """One clip of a side. `id` is its file's name in a sample folder, its own in a reference; `sha256` that of its
    bytes. Template and placeholders are SSv2's, and empty where there are none; `checkpoint` is what made it."""

    id: str
    path: File
    prompt: str
    sha256: str
    seed: int | None = None
    template: str = ""
    placeholders: tuple[str, ...] = ()
    checkpoint: str = ""


class BadClip(Exception):
    """A clip that cannot be taken; the sentence names it."""


# ---- the generated side


def generated_clips(folder: Path) -> tuple[list[Clip], Shape]:
    """The clips of a sample folder by file name, and the shape that they share, as `samples.jsonl` has it.

    Raises UserError where list and files are not each other's, where clips are of several shapes, and where two have
    the same prompt and seed. Two of the same bytes are taken: a model that has collapsed makes such.
    """
    entries = _entries(folder)
    shapes = {
        name: Shape(*(entry[key] for key in ("num_frames", "fps", "height", "width")))  # type: ignore[arg-type]
        for name, entry in entries.items()
    }
    first, shape = next(iter(shapes.items()))
    for name, other in shapes.items():
        if other != shape:
            raise UserError(
                f"{name} in {folder} has {other}, but {first} {shape}; evaluate clips of one shape at a time"
            )
    strays = sorted(
        path.name
        for path in names_in(folder)
        if path.suffix.lower() in VIDEO_EXTENSIONS and path.name not in entries and not path.name.startswith(".")
    )
    if strays:
        raise UserError(
            f"{folder} holds {_several(strays)} without a prompt in {SAMPLES}, as where an earlier sample.py wrote "
            "into the same folder; move them away, or sample into an empty folder"
        )
    clips = [
        Clip(
            name, folder / name, str(entry["prompt"]), _sha256(folder / name), int(str(entry["seed"])),
            checkpoint=str(entry.get("checkpoint", "")),
        )
        for name, entry in sorted(entries.items())
    ]  # fmt: skip
    _refuse_twins(clips, folder)
    return clips, shape


def _entries(folder: Path) -> dict[str, Mapping[str, object]]:
    """The lines of samples.jsonl by file, checked."""
    path = folder / SAMPLES
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"sample folder {folder} has no {SAMPLES} that can be read ({in_words(error)}); "
            "give --generated a folder that sample.py wrote"
        ) from error
    entries: dict[str, Mapping[str, object]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry = _parsed(line, f"line {number} of {path}")
        name = str(entry["file"])
        if Path(name).name != name:
            raise UserError(
                f"line {number} of {path} names {name}, which is not a file's bare name; move it into {folder}"
            )
        if name in entries:
            raise UserError(f"line {number} of {path} names {name} a second time; each clip counts once")
        if not is_file(folder / name):
            raise UserError(
                f"line {number} of {path} names {name}, which is not in {folder}; sample again, or remove it"
            )
        entries[name] = entry
    if not entries:
        raise UserError(f"{path} lists no clip; make some with sample.py")
    return entries


def _parsed(line: str, where: str) -> Mapping[str, object]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}; mend or remove it") from error
    for key, kind in FIELDS.items():
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{where} has no {key} as sample.py writes it; each line needs {', '.join(FIELDS)}")
        if not (value.strip() if isinstance(value, str) else key == "seed" or value > 0):  # type: ignore[operator]
            raise UserError(f"{where} has {key} {value!r}, which no clip has; mend or remove it")
    # Before anything is reckoned with them: JSON has numbers of any size, and Python infinity and NaN besides.
    for what, number, most in (
        ("fps", entry["fps"], FASTEST),
        ("pixels in all its frames", entry["num_frames"] * entry["height"] * entry["width"], MOST_PIXELS),
    ):
        if number > most:
            raise UserError(f"{where} has {number} {what}, and at most {most} can be read; mend or remove it")
    return entry


def _refuse_twins(clips: Sequence[Clip], folder: Path) -> None:
    """Raises UserError where two clips have the same prompt and seed."""
    keys = [(clip.prompt, clip.seed) for clip in clips]
    key, count = Counter(keys).most_common(1)[0]
    if count > 1:
        names = [clip.id for clip, other in zip(clips, keys, strict=True) if other == key]
        raise UserError(
            f"{_several(names)} in {folder} have the same prompt and seed; each clip counts once, so sample more with "
            "other seeds"
        )


# ---- the reference


def reference_clips(root: Path, *, split: str = "all", most: int = MOST_REFERENCE) -> tuple[list[Clip], list[str]]:
    """The captioned clips of a data set by id, at most so many (those with the smallest hashes), and notes on those
    that are listed but cannot be had. Raises UserError where there is none."""
    config = guess_format(str(root))
    splits: tuple[Split, ...] = ("train", "validation") if split == "all" else (split,)  # type: ignore[assignment]
    found: dict[str, ClipFile] = {}
    error: UserError | None = None
    notes = []
    for name in splits:
        try:
            found |= {clip.id: clip for clip in find_clips(config, name)}
        except NoSuchSplit as problem:  # not every data set has both
            error = problem
        except NoFiles as problem:
            error = problem
            notes.append(f"the {name} split was left out: it has no files")
    if not found and error is not None:
        raise error
    notes += [f"{clip.id} was left out: {clip.problem}" for clip in found.values() if clip.problem]
    usable = [clip for clip in found.values() if not clip.problem]
    usable.sort(key=lambda clip: (hashlib.sha256(clip.id.encode("utf-8", "surrogatepass")).hexdigest(), clip.id))
    clips, seen = [], set()
    for clip in sorted(usable[:most], key=lambda clip: clip.id):
        sha256 = _sha256(clip.path)
        if sha256 in seen:
            notes.append(f"{clip.id} was left out: another clip has the same bytes")
            continue
        seen.add(sha256)
        clips.append(Clip(clip.id, clip.path, clip.caption, sha256, None, clip.template, clip.placeholders))
    if len(clips) < 2:
        raise UserError(f"reference {root} has {len(clips)} usable clips, and at least 2 are needed to measure by")
    return clips, notes


# ---- pixels


def read_generated(clip: Clip, shape: Shape) -> Frames:
    """uint8 (T,H,W,3), every frame of the file. Raises BadClip where it is not of the shape that is said of it."""
    frames, times = _read(clip, Window(shape.fps, shape.num_frames, 0.0, "drop"))
    if len(times) != shape.num_frames:
        raise BadClip(f"{clip.id} has {len(times)} frames, and not {shape.num_frames} as {SAMPLES} says")
    if abs((times[-1] - times[0]) * shape.fps - (shape.num_frames - 1)) > 0.5:
        raise BadClip(f"{clip.id} does not run at {shape.fps:g} fps, as {SAMPLES} says")
    # An odd size is written with its edge repeated, for H.264 has even ones only.
    written = shape.height + shape.height % 2, shape.width + shape.width % 2
    if frames.shape[1:3] not in (written, (shape.height, shape.width)):
        found = f"{frames.shape[2]}x{frames.shape[1]}"
        raise BadClip(f"{clip.id} is {found}, and not {shape.width}x{shape.height} as {SAMPLES} says")
    return frames[:, : shape.height, : shape.width]


def read_reference(clip: Clip, shape: Shape) -> Frames:
    """uint8 (T,H,W,3): the middle of a clip at the frame rate, length and size of those generated. Raises BadClip, also
    where the clip's own frame rate is lower: it would stand still now and then."""
    frames, times = _read(clip, Window(shape.fps, shape.num_frames, 0.5, "drop"))
    rate = (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else shape.fps
    if rate < SLOWEST * shape.fps:
        raise BadClip(f"{clip.id} has {rate:.3g} frames a second, and {shape.fps:g} are needed")
    same = frames.shape[1:3] == (shape.height, shape.width)
    return frames if same else resize_crop(frames, Crop(shape.height, shape.width))


def _read(clip: Clip, window: Window) -> tuple[Frames, list[float]]:
    """At the file's own size, on both sides: cropping while decoding finds colour between its samples another way, and
    the same file must give the same frames."""
    try:
        frames, times = read_window(clip.path, window, None)
    except UnreadableClip as error:
        raise BadClip(f"{clip.id} cannot be read: {error.reason}") from error
    except ShortClip as error:
        raise BadClip(f"{clip.id} is too short for {window.num_frames} frames at {window.fps:g} fps") from error
    return frames, times.tolist()


def suffixes(clips: Sequence[Clip]) -> str:
    """The kinds of files, such as ".mp4 .webm"."""
    return " ".join(sorted({Path(clip.path.name).suffix.lower() for clip in clips if not isinstance(clip.path, str)}))


def _sha256(path: File) -> str:
    try:
        if isinstance(path, Packed):
            return hashlib.sha256(path.loaded().data or b"").hexdigest()
        hashed = hashlib.sha256()
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
        return hashed.hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {in_words(error)}; change that or remove it") from error


def _several(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
