"""`vdm evaluate --selftest`: whether the weight files that are there give the numbers that they are known to give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vdm.errors import Failure, UserError
from vdm.evaluation.extractors import I3D_FILES
from vdm.files import is_file
from vdm.metrics import clip, fvd
from vdm.metrics.i3d import load_i3d
from vdm.weights import sha256

CLIP_FILE, CLIP_IMAGE = "ViT-B-32.pt", "CLIP.png"
# The published files of which the whole hash is known; what OpenAI's own loader checks.
HASHES = {CLIP_FILE: "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"}
OTHERS = ("c3d_ucf101.pt", "conv3d_deepnetA_ucf.npz", "rgb_imagenet.pt", "dino_vitbase16_pretrain.pth")


@dataclass(frozen=True)
class Check:
    """One golden value; `ok` None where there was nothing to compare, and `found` says why."""

    file: str
    what: str
    expected: str
    found: str
    ok: bool | None


def selftest(weights_dir: Path) -> list[Check]:
    """A check or more for each weight file that golden values are known of, there or not."""
    return [*_i3d(weights_dir), *_clip(weights_dir), *_without_golden_values(weights_dir)]


def _i3d(weights_dir: Path) -> Iterator[Check]:
    for name in I3D_FILES:
        if not is_file(weights_dir / name):
            yield _absent(weights_dir / name)
            continue
        try:
            for one in fvd.selftest(load_i3d(weights_dir / name).net):
                yield Check(name, one.name, f"{one.expected:.2f} +- 1", f"{one.found:.2f}", one.ok)
        except UserError as error:
            yield Check(name, "loading", "an I3D of Kinetics-400", str(error), False)


def _clip(weights_dir: Path) -> Iterator[Check]:
    file, image = weights_dir / CLIP_FILE, weights_dir / CLIP_IMAGE
    if not is_file(file):
        yield _absent(file)
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


def _without_golden_values(weights_dir: Path) -> Iterator[Check]:
    for name in OTHERS:
        if is_file(weights_dir / name):
            yield Check(name, "sha256", "not known", sha256(weights_dir / name)[:16], None)
        else:
            yield _absent(weights_dir / name)


def _absent(file: Path) -> Check:
    return Check(file.name, "file", "there", f"not there: {file}", None)


def table(checks: list[Check]) -> str:
    """A line for each check."""
    words = {True: "ok", False: "OFF", None: "-"}
    return "".join(
        f"{words[one.ok]:4} {one.file}: {one.what}: expected {one.expected}, found {one.found}\n" for one in checks
    )
