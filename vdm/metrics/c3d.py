"""C3D of UCF-101 (Tran et al. 2015), the judge of the published Inception score of videos, in both of its files.

c3d_ucf101.pt, TorchScript, is StyleGAN-V's; it is called as it is there. conv3d_deepnetA_ucf.npz is TGANv2's, written
by chainer, and is run by the C3D below, whose mean clip lies beside it in mean2.npz.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm.errors import UserError
from vdm.metrics.exact import full_precision
from vdm.metrics.resize import as_uint8
from vdm.metrics.torchscript import is_torchscript, load_torchscript
from vdm.weights import sha256

NUM_FRAMES = 16
NUM_CLASSES = 101
METRIC = "is_c3d_ucf101"
MEAN_FILE = "mean2.npz"

_SIDE = 112
_BORDER = 8  # where the 112 pixels of the mean clip begin, down and across
_GIVE = "give c3d_ucf101.pt or conv3d_deepnetA_ucf.npz"
# Channels of each convolution, in widths; a pool follows those whose name is here with its kernel.
_CONVOLUTIONS = {
    "conv1a": 1, "conv2a": 2, "conv3a": 4, "conv3b": 4, "conv4a": 8, "conv4b": 8, "conv5a": 8, "conv5b": 8,
}  # fmt: skip
_POOLS = {"conv1a": (1, 2, 2), "conv2a": (2, 2, 2), "conv3b": (2, 2, 2), "conv4b": (2, 2, 2), "conv5b": (2, 2, 2)}


class C3D(nn.Module):
    """uint8 (B,16,H,W,3) RGB -> logits (B,101). The published network has the default sizes.

    Whole frames are squashed to 112 x 112 by bilinear sampling with aligned corners (chainer's resize_images), in BGR,
    less the mean clip, grey levels: as TGANv2 reads the frames of stored clips. Pools round up (7 -> 4), as caffe's do.
    """

    mean: Tensor  # (3,16,112,112) BGR in grey levels

    def __init__(self, *, width: int = 64, hidden: int = 4096):
        super().__init__()
        channels = 3
        for name, factor in _CONVOLUTIONS.items():
            self.add_module(name, nn.Conv3d(channels, factor * width, 3, padding=1))
            channels = factor * width
        self.fc6 = nn.Linear(channels * 4 * 4, hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        self.fc8 = nn.Linear(hidden, NUM_CLASSES)
        self.register_buffer("mean", torch.zeros(3, NUM_FRAMES, _SIDE, _SIDE))
        self.eval().requires_grad_(False)

    def forward(self, clips: Tensor) -> Tensor:
        x = self.prepared(clips)
        for name in _CONVOLUTIONS:
            x = F.relu(self.get_submodule(name)(x), inplace=True)
            if name in _POOLS:
                x = F.max_pool3d(x, _POOLS[name], ceil_mode=True)
        x = F.relu(self.fc6(x.flatten(1)))
        x = F.relu(self.fc7(x))
        logits: Tensor = self.fc8(x)
        return logits

    def prepared(self, clips: Tensor) -> Tensor:
        """uint8 (B,16,H,W,3) RGB -> (B,3,16,112,112) BGR in grey levels about the mean clip."""
        frames = clips.flatten(0, 1).movedim(-1, 1).flip(1).to(self.mean.dtype).contiguous()
        frames = F.interpolate(frames, size=(_SIDE, _SIDE), mode="bilinear", align_corners=True)
        return frames.unflatten(0, (len(clips), NUM_FRAMES)).movedim(1, 2) - self.mean


class Scripted(nn.Module):
    """The TorchScript file behind the same call: it takes uint8 (B,3,16,H,W) and answers with probabilities.

    Their logarithms are logits of them; a probability of zero counts as float32's smallest, so that none is infinite.
    """

    def __init__(self, script: nn.Module, *, source: Path):
        super().__init__()
        self.script, self.source = script, source

    def forward(self, clips: Tensor) -> Tensor:
        try:
            shares = self.script(clips.movedim(-1, 1).contiguous())
        except RuntimeError as error:  # another network, which stumbles over such a clip
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{self.source} does not take uint8 clips as C3D does ({reason}); {_GIVE}") from error
        if not isinstance(shares, Tensor) or shares.shape != (len(clips), NUM_CLASSES):
            raise UserError(f"{self.source} does not judge by the {NUM_CLASSES} classes of UCF-101; {_GIVE}")
        if not (shares >= 0).all() or not torch.allclose(shares.sum(1), shares.new_ones(len(clips)), atol=1e-3):
            raise UserError(f"{self.source} does not answer with probabilities, as the published C3D does; {_GIVE}")
        return shares.float().clamp_min(torch.finfo(torch.float32).tiny).log()


@dataclass(frozen=True)
class Judge:
    """A C3D from a file: `net` takes uint8 (B,16,H,W,3), gives logits (B,101); scores by it are named `metric`."""

    net: C3D | Scripted
    sha256: str
    metric: str = METRIC


def load_c3d(path: str | Path) -> Judge:
    """The judge in c3d_ucf101.pt or conv3d_deepnetA_ucf.npz, told apart by content, on the CPU in float32.

    Raises UserError, which names the file, for what is missing, damaged or another network. Nothing is unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weight file {path} does not exist; {_GIVE}")
    if is_torchscript(path):
        return Judge(Scripted(load_torchscript(path), source=path), sha256(path))
    arrays = _read_npz(path)
    if "conv1a/W" not in arrays:
        raise UserError(f"{path} is no C3D, for it has no conv1a/W; {_GIVE}")
    with torch.device("meta"):  # the file's tensors become the network's, so none are drawn
        net = C3D()
    tensors = {"mean": _read_mean(path.with_name(MEAN_FILE))}
    for name, spec in net.state_dict().items():
        if name not in tensors:
            tensors[name] = _checked(path, arrays, name.replace(".weight", "/W").replace(".bias", "/b"), spec)
    net.load_state_dict(tensors, assign=True)
    return Judge(net, sha256(path))


def _read_npz(path: Path) -> Mapping[str, npt.NDArray[np.generic]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = "it is damaged, or holds more than plain arrays"
        raise UserError(f"{path} cannot be read as an .npz file: {reason}; {_GIVE}") from error


def _checked(path: Path, arrays: Mapping[str, npt.NDArray[np.generic]], name: str, spec: Tensor) -> Tensor:
    array = arrays.get(name)
    if array is None:
        raise UserError(f"{path} is not all of a C3D: it lacks {name}; {_GIVE}")
    if array.shape != spec.shape:
        raise UserError(f"{path} is another C3D: {name} is {array.shape}, not {tuple(spec.shape)}; {_GIVE}")
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise UserError(f"{path} is damaged: {name} does not hold plain numbers; download it again")
    return torch.from_numpy(array.astype(np.float32, copy=False))


def _read_mean(path: Path) -> Tensor:
    """float32 (3,16,112,112): the part of the mean clip that the network sees."""
    if not path.is_file():
        raise UserError(f"the C3D in an .npz file needs its mean clip beside it: {path} does not exist; put it there")
    mean = _read_npz(path).get("mean", np.zeros(()))
    end = _BORDER + _SIDE
    if mean.ndim != 4 or mean.shape[:2] != (3, NUM_FRAMES) or min(mean.shape[2:]) < end or mean.dtype.kind != "f":
        raise UserError(f"{path} holds no mean clip of 3 x {NUM_FRAMES} x 128 x 171 numbers under 'mean'; download it")
    return torch.from_numpy(mean[:, :, _BORDER:end, _BORDER:end].astype(np.float32))


def c3d_logits(clips: Tensor | npt.NDArray[np.uint8], judge: Judge) -> Tensor:
    """clips uint8 (B,16,H,W,3) -> float32 logits (B,101) on the CPU, for `inception_score`; each clip by itself.

    Raises UserError for clips of other than 16 frames, and ValueError for other shapes.
    """
    clips = as_uint8(clips)
    if clips.dim() != 5:
        raise ValueError(f"clips are uint8 (B, T, H, W, 3), not {tuple(clips.shape)}")
    if clips.shape[1] != NUM_FRAMES:
        raise UserError(f"C3D judges clips of {NUM_FRAMES} frames, not {clips.shape[1]}; cut or make such clips")
    device = next(iter(judge.net.state_dict().values()), clips).device
    logits = torch.empty(len(clips), NUM_CLASSES)
    with full_precision(device):
        for index, clip in enumerate(clips):
            logits[index] = judge.net(clip[None].to(device))[0]
    if not logits.isfinite().all():
        raise ValueError("C3D gave logits that are not finite numbers: its weights are damaged")
    return logits
