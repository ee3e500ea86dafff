"""`vdm evaluate --selftest`: whether the weight files that are there give the numbers that they are known to give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vdm.errors import Failure, UserError
from vdm.evaluation.catalogue import METRICS
from vdm.evaluation.extractors import EXTRACTORS, I3D_FILES, IMAGENET_FILES
from vdm.files import is_file
from vdm.metrics import clip, fvd
from vdm.metrics.c3d import MEAN_FILE, load_c3d
from vdm.metrics.i3d import load_i3d
from vdm.metrics.i3d_files import IMAGENET
from vdm.metrics.videomae import load_videomae
from vdm.metrics.vit import load_dino
from vdm.weights import sha256

CLIP_FILE, CLIP_IMAGE = "ViT-B-32.pt", "CLIP.png"
# The published files of which the whole hash is known; what OpenAI's own loader checks.
HASHES = {CLIP_FILE: "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"}
# Those of which nothing but their layout is known: whether they load is all that can be said.
LOADERS: dict[str, Callable[[Path], object]] = {
    "clip": clip.load_clip, "c3d": load_c3d, "dino": load_dino, "videomae": load_videomae,
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One golden value; `ok` None where there was nothing to compare, and `found` says why."""

    file: str
    what: str
    expected: str
    found: str
    ok: bool | None


def selftest(weights_dir: Path) -> list[Check]:
    """A check or more for each weight file that any metric can use, there or not."""
    loaded = (check for name in LOADERS for check in _loads(name, weights_dir))
    return [*_i3d(weights_dir), *_imagenet(weights_dir), *_clip(weights_dir), *loaded, *_mean(weights_dir)]


def _i3d(weights_dir: Path) -> Iterator[Check]:
    for name in I3D_FILES:
        if not is_file(weights_dir / name):
            yield _absent(weights_dir / name, "i3d")
            continue
        try:
            for one in fvd.selftest(load_i3d(weights_dir / name).net):
                yield Check(name, one.name, f"{one.expected:.2f} +- 1", f"{one.found:.2f}", one.ok)
        except UserError as error:
            yield Check(name, "loading", "an I3D of Kinetics-400", str(error), False)


def _clip(weights_dir: Path) -> Iterator[Check]:
    file, image = weights_dir / CLIP_FILE, weights_dir / CLIP_IMAGE
    if not is_file(file):
        yield _absent(file, "clip")
        return
    found = sha256(file)
    yield Check(CLIP_FILE, "sha256", HASHES[CLIP_FILE][:16], found[:16], found == HASHES[CLIP_FILE])
    what, expected = "three texts of OpenAI's README", " ".join(f"{p:.4f}" for p in clip.GOLDEN_PROBABILITIES)
    if not is_file(image):
        yield Check(CLIP_FILE, what, expected, f"not checked: put CLIP.png of github.com/openai/CLIP at {image}", None)
        return
    try:
        shares = clip.selftest(clip.load_clip(file), image=image)
    except (Failure, UserError) as error:
        yield Check(CLIP_FILE, what, expected, str(error), False)
    else:
        yield Check(CLIP_FILE, what, expected, " ".join(f"{p:.4f}" for p in shares.tolist()), True)


def _imagenet(weights_dir: Path) -> Iterator[Check]:
    """By the checksum of the published file, which `load_i3d` knows; any other copy is only loaded."""
    for file in (weights_dir / name for name in IMAGENET_FILES):
        if not is_file(file):
            yield _absent(file, "i3d_imagenet")
            continue
        try:
            loaded = load_i3d(file)
        except UserError as error:
            yield Check(file.name, "loading", "an I3D of ImageNet and Kinetics-400", str(error), False)
            continue
        found = "another copy" if loaded.warning else "that"
        yield Check(file.name, "checksum", "the published file", found, None if loaded.warning else True)
        yield Check(file.name, "weights", IMAGENET, loaded.metric, loaded.metric == IMAGENET)


def _loads(extractor: str, weights_dir: Path) -> Iterator[Check]:
    for file in (weights_dir / name for name in EXTRACTORS[extractor].files if name not in HASHES):
        if not is_file(file):
            yield _absent(file, extractor)
            continue
        yield Check(file.name, "sha256", "not known", sha256(file)[:16], None)
        try:
            LOADERS[extractor](file)
        except UserError as error:
            yield Check(file.name, "loading", "all of the network", str(error), False)
        else:
            yield Check(file.name, "loading", "all of the network", "it", True)


def _mean(weights_dir: Path) -> Iterator[Check]:
    if not is_file(weights_dir / MEAN_FILE):
        yield _absent(weights_dir / MEAN_FILE, "c3d", beside="beside conv3d_deepnetA_ucf.npz")


def _absent(file: Path, extractor: str, *, beside: str = "") -> Check:
    """What the file would be for."""
    files = EXTRACTORS[extractor].files
    metrics = ", ".join(metric.name for metric in METRICS.values() if EXTRACTORS[metric.extractor].files == files)
    return Check(file.name, "file", "there", f"not there: {file}, for {metrics} {beside}".rstrip(), None)


def table(checks: list[Check]) -> str:
    """A line for each check."""
    words = {True: "ok", False: "OFF", None: "-"}
    return "".join(
        f"{words[one.ok]:4} {one.file}: {one.what}: expected {one.expected}, found {one.found}\n" for one in checks
    )
