"""How fast clips come: raw decoding, our loader, and what else is installed: `python benchmarks/data.py`.

All read the same files in the same run: VP9 in webm of 427x240 at 12 fps, made from mini-something as a hand-held
camera would see it, with Something-Something V2's mean of 88 kB a clip; or those in `--root`. Every way delivers 16
frames of 256x256 at 8 fps as bytes, from a random moment on; "raw" only decodes, all frames and nothing else, and is
what the others are measured by. The ways take turns, `--rounds` times; the medians count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import cv2
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import environment, write_json
from vdm.cli import Parser, run
from vdm.data.cache import Cache, Entry, Plan, look_name
from vdm.data.dataset import ClipDataset
from vdm.data.find import find_clips, guess_format
from vdm.data.latents import CachedLatents
from vdm.data.loader import batches
from vdm.data.mini_something import render_clip
from vdm.data.settings import DataConfig
from vdm.data.transforms import Crop, Frames, resize_crop
from vdm.data.video import to_video
from vdm.errors import UserError

FRAMES, FPS, SIZE = 16, 8.0, 256
AUGMENTED = {"horizontal_flip": 0.5, "color_jitter": 0.2, "natural_captions": 0.5}


def make_clips(root: Path, num_clips: int) -> None:
    """Clips as Something-Something's, 3 to 5 seconds; a caption in a text file beside each."""
    for i in tqdm(range(num_clips), desc="making clips", unit="clip"):
        clip = render_clip(i, seed=0, height=240, width=427, num_frames=36 + i % 25, fps=12)
        write_vp9(root / f"{i}.webm", hand_held(clip.frames, seed=i), fps=12)
        (root / f"{i}.txt").write_text(clip.label, encoding="utf-8")


def hand_held(frames: Frames, *, seed: int) -> Frames:
    """A clip (T,H,W,3) on rough ground that moves a little, as all does before a camera that nobody has put down.

    Drawn ground stands still and costs a codec nothing, unlike that of filmed clips.
    """
    rng, (height, width) = np.random.default_rng(seed), frames.shape[1:3]
    coarse, fine = rng.normal(0, 14, (height // 3, width // 3)), rng.normal(0, 3.5, (height + 40, width + 40))
    ground = (cv2.resize(coarse, (width + 40, height + 40)) + fine).astype(np.float32)
    out = np.empty_like(frames)
    for t, frame in enumerate(frames):
        drift = np.array([[1, 0, -20 - 8 * np.sin(t / 9 + seed)], [0, 1, -20 - 8 * np.cos(t / 13)]])
        out[t] = np.clip(frame + cv2.warpAffine(ground, drift, (width, height))[..., None], 0, 255)
    return out


def write_vp9(path: Path, frames: Frames, *, fps: int) -> None:
    """uint8 (T,H,W,3) as VP9."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(
            "libvpx-vp9", rate=fps, options={"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "0"}
        )
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for pixels in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))


def pack(files: Sequence[Path], target: Path) -> None:
    """The same clips as one tar shard."""
    with tarfile.open(target, "w") as tar:
        for file in files:
            tar.add(file, arcname=file.name)
            if file.with_suffix(".txt").is_file():
                tar.add(file.with_suffix(".txt"), arcname=f"{file.stem}.txt")
            else:
                raise UserError(f"{file} has no caption beside it; give a folder of videos with a .txt each")


def raw(path: Path, start: float = 0.0) -> None:
    """Every frame decoded in one thread, and dropped."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        for _ in container.decode(stream):
            pass


def with_cv2(path: Path, start: float) -> torch.Tensor:
    """What one writes by hand: frames read up to the last of 16 that are picked by count, resized and cropped."""
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    chosen, frames = _chosen(count, video.get(cv2.CAP_PROP_FPS), start), {}
    for index in range(max(chosen) + 1):
        good, frame = video.read()
        if not good:
            break
        if index in chosen:
            frames[index] = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    last = max(frames)
    return _square([frames[min(i, last)] for i in chosen])


def with_pyav(path: Path, start: float) -> torch.Tensor:
    """The same with the decoder that we use, and its own conversion to RGB."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        count = int(float(container.duration or 0) / av.time_base * float(stream.average_rate or FPS))
        chosen, frames = _chosen(count, float(stream.average_rate or FPS), start), {}
        for index, frame in enumerate(container.decode(stream)):
            if index in chosen:
                frames[index] = frame.to_ndarray(format="rgb24", threads=1)
            if index >= max(chosen):
                break
    last = max(frames)
    return _square([frames[min(i, last)] for i in chosen])


def with_decord(path: Path, start: float) -> torch.Tensor:
    import decord  # type: ignore[import-not-found]

    reader = decord.VideoReader(str(path), num_threads=1)
    return _square(list(reader.get_batch(_chosen(len(reader), reader.get_avg_fps(), start)).asnumpy()))


def with_torchcodec(path: Path, start: float) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, seek_mode="approximate")
    chosen = _chosen(len(decoder), decoder.metadata.average_fps, start)
    return _square(list(decoder.get_frames_at(chosen).data.permute(0, 2, 3, 1).numpy()))


def _chosen(count: int, rate: float, start: float) -> list[int]:
    """16 of `count` frames by their number, 1/8 of a second apart, from a share of the slack on."""
    steps = np.arange(FRAMES) * rate / FPS
    first = start * max(0.0, count - 1 - steps[-1])
    return [int(i) for i in np.minimum(first + steps, count - 1)]


def _square(frames: list[Frames]) -> torch.Tensor:
    return to_video(resize_crop(np.stack(frames), Crop(SIZE, SIZE)))


def rivals() -> dict[str, Callable[[Path, float], object]]:
    """What is installed and reads a clip."""
    found: dict[str, Callable[[Path, float], object]] = {"cv2 loop": with_cv2, "PyAV loop": with_pyav}
    for name, read in (("decord", with_decord), ("torchcodec", with_torchcodec)):
        try:
            __import__(name)
        except (ImportError, OSError, RuntimeError):  # torchcodec wants FFmpeg's libraries
            continue
        found[name] = read
    return found


def _config(root: Path) -> DataConfig:
    size = {"height": SIZE, "width": SIZE, "fps": FPS, "min_frames": FRAMES, "max_frames": FRAMES}
    return replace(guess_format(str(root)), **size, max_bad_share=0.5)  # type: ignore[arg-type]


def write_latents(folder: Path, config: DataConfig) -> CachedLatents:
    """The stream of a cache as of Stable Diffusion's VAE, whose numbers do not matter here."""
    clips = ClipDataset(config, split="train", seed=0, batch_size=1)
    entries = [Entry(clips.source.id(i), clips.source.words(i), 4.0, 4.1) for i in range(len(clips))]
    plan = Plan({"train": len(clips)}, 0, {"train": len(clips)}, {"train": []}, "", "float16")
    cache = Cache.start(folder, {}, plan)
    moments = torch.zeros(8, FRAMES, SIZE // 8, SIZE // 8, dtype=torch.float16)
    cache.write_clips("train", 0, entries, {look_name(i, 0, False): moments for i in range(len(clips))})
    return CachedLatents(config, split="train", seed=0, batch_size=1, cache=cache)


def ways(files: Sequence[Path], root: Path, folder: Path) -> dict[str, Callable[[], None]]:
    """Every way to go once through all clips in this process."""
    starts = np.random.default_rng(0).random(len(files)).tolist()

    def over(read: Callable[[Path, float], object]) -> Callable[[], None]:
        return lambda: [read(file, start) for file, start in zip(files, starts, strict=True)] and None

    def loaded(clips: ClipDataset) -> Callable[[], None]:
        return lambda: [clips[i] for i in range(len(files))] and None

    plain = _config(root)
    packed = replace(plain, format="webdataset", root=str(folder / "shard.tar"))
    streams = {"loader": plain, "loader, all augmentation": replace(plain, **AUGMENTED), "loader, tar shard": packed}
    return {
        "raw": over(raw),
        **{name: loaded(ClipDataset(one, split="train", seed=0, batch_size=1)) for name, one in streams.items()},
        "latent cache": loaded(write_latents(folder / "cache", plain)),
        **{name: over(read) for name, read in rivals().items()},
    }


def with_workers(root: Path, num_clips: int, num_workers: int) -> dict[str, float]:
    """Clips per second through the data loader in batches of four, and MiB that a worker holds."""
    clips = ClipDataset(replace(_config(root), **AUGMENTED), split="train", seed=0, batch_size=4)
    stream = batches(clips, batch_size=4, num_workers=num_workers)
    next(stream)  # the workers are up
    began = time.perf_counter()
    for _ in range(num_clips // 4):
        next(stream)
    seconds, memory = time.perf_counter() - began, max(_children(), default=0.0)
    stream.close()
    return {"rate": 4 * (num_clips // 4) / seconds, "mib": memory}


def _children() -> Iterator[float]:
    """MiB that each child process has to itself, beyond what it shares with this one."""
    for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in child.read_text().split():
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            yield sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def command(arguments: Sequence[str]) -> None:
    parser = Parser(prog="data.py", description=str(__doc__).split("\n")[0])
    parser.flag("--root", type=Path, metavar="DIR", help="a folder of videos with a .txt beside each; made by default")
    parser.flag("--num_clips", type=int, default=64, metavar="N", help="how many to make (default 64)")
    parser.flag("--rounds", type=int, default=5, metavar="N", help="turns of each way (default 5)")
    parser.flag("--device", choices=("cpu",), default="cpu", help="it is of the CPU")
    parser.flag("--json", type=Path, metavar="FILE", help="save the numbers")
    options: argparse.Namespace = parser.parse_args(arguments)
    for name in ("num_clips", "rounds"):
        if getattr(options, name) < (8 if name == "num_clips" else 1):
            raise UserError(f"--{name} is {getattr(options, name)}; use more")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or Path(folder) / "clips"
        if options.root is None:
            root.mkdir()
            make_clips(root, options.num_clips)
        clips = find_clips(replace(guess_format(str(root)), format="folder"), "train")
        files = [Path(str(clip.path)) for clip in clips]
        kilobytes = round(statistics.mean(file.stat().st_size for file in files) / 1000, 1)
        pack(files, Path(folder) / "shard.tar")
        measured = _rates(ways(files, root, Path(folder)), len(files), options.rounds)
        workers = {str(n): with_workers(root, len(files), n) for n in (0, 1, 2)}
    versions = {name: _version(name) for name in ("av", "opencv-python", "decord", "torchcodec")}
    about = {"clips": len(files), "kb_a_clip": kilobytes, "rounds": options.rounds, "readers": versions}
    record = {**environment(torch.device("cpu")), **about, "ways": measured, "workers": workers}
    print("\n" + table(record))
    if options.json is not None:
        write_json(options.json, record)


def table(record: Mapping[str, Any]) -> str:
    """The numbers of a run in Markdown."""
    lines = ["| one core | clips per second | of raw decoding |", "|---|---|---|"]
    lines += [f"| {name} | {one['rate']:.1f} | {one['of_raw']:.2f} |" for name, one in record["ways"].items()]
    lines += ["", "| workers, all augmentation | clips per second | MiB a worker |", "|---|---|---|"]
    lines += [f"| {number} | {one['rate']:.1f} | {one['mib']:.0f} |" for number, one in record["workers"].items()]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _rates(ways: Mapping[str, Callable[[], None]], count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Of every way the clips per second, and its speed against that of "raw" in the same round; medians."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(rounds), desc="rounds", unit="round"):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return {
        name: {
            "rate": count / statistics.median(taken),
            "of_raw": statistics.median(raw / own for raw, own in zip(seconds["raw"], taken, strict=True)),
        }
        for name, taken in seconds.items()
    }


if __name__ == "__main__":
    raise SystemExit(run(command))
