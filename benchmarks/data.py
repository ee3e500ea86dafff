"""How fast clips come: raw decoding, our loader, and what else is installed: `python benchmarks/data.py`.

All read the same files in the same run: Something-Something-like VP9 clips of 427x240 at 12 fps, made from
mini-something, or those in `--root`. Every way delivers 16 frames of 256x256 at 8 fps; "raw" only decodes, all frames
and nothing else, and is what the others are measured by. The ways take turns, `--rounds` times; the medians count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
from vdm.data.dataset import ClipDataset
from vdm.data.find import find_clips, guess_format
from vdm.data.loader import batches
from vdm.data.mini_something import render_clip
from vdm.data.settings import DataConfig
from vdm.data.video import to_video
from vdm.errors import UserError

FRAMES, FPS, SIZE = 16, 8.0, 256
AUGMENTED = {"horizontal_flip": 0.5, "color_jitter": 0.2, "natural_captions": 0.5}


def make_clips(root: Path, num_clips: int) -> None:
    """Clips as Something-Something's: VP9 in webm, 427x240, 12 fps, 3 to 5 seconds; a caption in a text file beside."""
    for i in tqdm(range(num_clips), desc="making clips", unit="clip"):
        clip = render_clip(i, seed=0, height=240, width=427, num_frames=36 + i % 25, fps=12)
        with av.open(str(root / f"{i}.webm"), "w") as file:
            options = {"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "0"}
            stream = file.add_stream("libvpx-vp9", rate=12, options=options)
            stream.width, stream.height, stream.pix_fmt = 427, 240, "yuv420p"
            for pixels in clip.frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode(None))
        (root / f"{i}.txt").write_text(clip.label, encoding="utf-8")


def pack(files: Sequence[Path], target: Path) -> None:
    """The same clips as one tar shard."""
    with tarfile.open(target, "w") as tar:
        for file in files:
            tar.add(file, arcname=file.name)
            if file.with_suffix(".txt").is_file():
                tar.add(file.with_suffix(".txt"), arcname=f"{file.stem}.txt")
            else:
                raise UserError(f"{file} has no caption beside it; give a folder of videos with a .txt each")


def raw(path: Path) -> None:
    """Every frame decoded in one thread, and dropped."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        for _ in container.decode(stream):
            pass


def with_cv2(path: Path) -> torch.Tensor:
    """What one writes by hand: every frame read, 16 of them picked by count, resized and cropped."""
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    rate, frames = video.get(cv2.CAP_PROP_FPS) or 12.0, []
    while True:
        good, frame = video.read()
        if not good:
            break
        frames.append(frame)
    chosen = np.minimum(np.arange(FRAMES) * rate / FPS, len(frames) - 1).astype(int)
    return _square([cv2.cvtColor(frames[i], cv2.COLOR_BGR2RGB) for i in chosen])


def with_decord(path: Path) -> torch.Tensor:
    import decord  # type: ignore[import-not-found]

    reader = decord.VideoReader(str(path), num_threads=1)
    chosen = np.minimum(np.arange(FRAMES) * reader.get_avg_fps() / FPS, len(reader) - 1).astype(int)
    return _square(list(reader.get_batch(chosen.tolist()).asnumpy()))


def with_torchcodec(path: Path) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1)
    rate = decoder.metadata.average_fps
    chosen = np.minimum(np.arange(FRAMES) * rate / FPS, len(decoder) - 1).astype(int)
    return _square(list(decoder.get_frames_at(chosen.tolist()).data.permute(0, 2, 3, 1).numpy()))


def _square(frames: list[Any]) -> torch.Tensor:
    height, width = frames[0].shape[:2]
    scale = SIZE / min(height, width)
    size = (max(SIZE, round(width * scale)), max(SIZE, round(height * scale)))
    left, top = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
    resized = [cv2.resize(frame, size)[top : top + SIZE, left : left + SIZE] for frame in frames]
    return to_video(np.stack(resized))


def rivals() -> dict[str, Callable[[Path], object]]:
    """What is installed and reads a clip."""
    found: dict[str, Callable[[Path], object]] = {"cv2 loop": with_cv2}
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


def ways(files: Sequence[Path], root: Path, shard: Path) -> dict[str, Callable[[], None]]:
    """Every way to go once through all clips in this process."""

    def over(read: Callable[[Path], object]) -> Callable[[], None]:
        return lambda: [read(file) for file in files] and None

    def loaded(config: DataConfig) -> Callable[[], None]:
        clips = ClipDataset(config, split="train", seed=0, batch_size=1)
        return lambda: [clips[i] for i in range(len(files))] and None

    plain = _config(root)
    packed = replace(plain, format="webdataset", root=str(shard))
    return {
        "raw": over(raw),
        "loader": loaded(plain),
        "loader, all augmentation": loaded(replace(plain, **AUGMENTED)),
        "loader, tar shard": loaded(packed),
        **{name: over(read) for name, read in rivals().items()},
    }


def with_workers(root: Path, num_clips: int, num_workers: int) -> tuple[float, float]:
    """Clips per second through the data loader in batches of four, and MiB that a worker holds."""
    clips = ClipDataset(replace(_config(root), **AUGMENTED), split="train", seed=0, batch_size=4)
    stream = batches(clips, batch_size=4, num_workers=num_workers)
    next(stream)  # the workers are up
    began = time.perf_counter()
    for _ in range(num_clips // 4):
        next(stream)
    seconds, memory = time.perf_counter() - began, max(_children(), default=0.0)
    stream.close()
    return 4 * (num_clips // 4) / seconds, memory


def _children() -> Iterator[float]:
    """MiB of its own that each child process holds."""
    for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in child.read_text().split():
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            yield next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def command(arguments: Sequence[str]) -> None:
    parser = Parser(prog="data.py", description=str(__doc__).split("\n")[0])
    parser.flag("--root", type=Path, metavar="DIR", help="a folder of videos with a .txt beside each; made by default")
    parser.flag("--num_clips", type=int, default=64, metavar="N", help="how many to make (default 64)")
    parser.flag("--rounds", type=int, default=3, metavar="N", help="turns of each way (default 3)")
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
        pack(files, Path(folder) / "shard.tar")
        rates = _rates(ways(files, root, Path(folder) / "shard.tar"), len(files), options.rounds)
        print(f"\n| clips per second, one core | median of {options.rounds} | of raw decoding |\n|---|---|---|")
        for name, rate in rates.items():
            print(f"| {name} | {rate:.1f} | {rate / rates['raw']:.2f} |")
        workers = {n: with_workers(root, len(files), n) for n in (0, 1, 2)}
    print("\n| workers, all augmentation | clips per second | MiB a worker |\n|---|---|---|")
    for number, (rate, memory) in workers.items():
        print(f"| {number} | {rate:.1f} | {memory:.0f} |")
    if options.json is not None:
        saved = {"rates": rates, "workers": {n: {"rate": r, "mib": m} for n, (r, m) in workers.items()}}
        about = {"clips": len(files), "rounds": options.rounds, "versions_of_av": av.__version__}
        write_json(options.json, {**environment(torch.device("cpu")), **about, **saved})


def _rates(ways: dict[str, Callable[[], None]], count: int, rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(rounds), desc="rounds", unit="round"):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return {name: count / statistics.median(taken) for name, taken in seconds.items()}


if __name__ == "__main__":
    raise SystemExit(run(command))
