"""I3D (Carreira and Zisserman 2017), the network behind FVD, as its TensorFlow graph has it.

Layers are named as in piergiaj's port, whose names most weight files have; `i3d_files.py` knows the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm.errors import UserError
from vdm.metrics.i3d_files import COUNTER, GIVE, read_i3d_file

SIZE = 224  # pixels; with more the logits become a map, which some code flattens into other features
MIN_FRAMES = 9  # 8 become one step of time, and the last pool takes two
NUM_CLASSES = 400  # of Kinetics

Layer = Literal["logits400", "pool1024"]
Triple = tuple[int, int, int]

_ONE: Triple = (1, 1, 1)
_TWO: Triple = (2, 2, 2)
_THREE: Triple = (3, 3, 3)
_FLAT_THREE: Triple = (1, 3, 3)
_FLAT_TWO: Triple = (1, 2, 2)
# Channels in; then out of b0, b1a, b1b, b2a, b2b, b3b.
_MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


def pad_same(x: Tensor, *, kernel: Triple, stride: Triple) -> Tensor:
    """x (B,C,T,H,W) with zeros around it as TensorFlow's SAME has them: as few as give ceil(size / stride) places.

    They depend on the size of x, and where their number is odd the one more is at the end.
    """
    pads: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(k - (size % s or s), 0)
        pads = [total // 2, total - total // 2, *pads]  # F.pad counts from the last axis
    return F.pad(x, pads) if any(pads) else x


def max_pool_same(x: Tensor, *, kernel: Triple, stride: Triple) -> Tensor:
    """SAME max pool of what no number of is negative, for which a border of zeros is no border."""
    return F.max_pool3d(pad_same(x, kernel=kernel, stride=stride), kernel, stride)


class Unit(nn.Module):
    """SAME convolution, norm by the stored statistics (whatever `train()` says), ReLU: (B,C,T,H,W) -> the same."""

    def __init__(self, channels_in: int, channels: int, *, kernel: Triple = _ONE, stride: Triple = _ONE, eps: float):
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv3d = nn.Conv3d(channels_in, channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(pad_same(x, kernel=self.kernel, stride=self.stride))
        bn = self.bn
        return F.relu(F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps), inplace=True)


class Mixed(nn.Module):
    """The inception block: four branches, their channels side by side."""

    def __init__(self, widths: Sequence[int], *, eps: float):
        super().__init__()
        channels, b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = Unit(channels, b0, eps=eps)
        self.b1a = Unit(channels, b1a, eps=eps)
        self.b1b = Unit(b1a, b1b, kernel=_THREE, eps=eps)
        self.b2a = Unit(channels, b2a, eps=eps)
        self.b2b = Unit(b2a, b2b, kernel=_THREE, eps=eps)
        self.b3b = Unit(channels, b3b, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool_same(x, kernel=_THREE, stride=_ONE)
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class Logits(nn.Module):
    """The last 1x1x1 convolution; a module of its own because files call it logits.conv3d."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1024, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv3d(x)
        return out


class I3D(nn.Module):
    """Kinetics-400 logits of RGB clips; 12,697,264 parameters, which do not train.

    bn_eps is 1e-3 in the original; VideoGPT's port and its heirs (TATS, LVDM, cd-fvd) have 1e-5. Padding is by size, as
    in TensorFlow; hassony2's port pads as if each size were even, and so differs where T is no multiple of 8.
    """

    def __init__(self, *, bn_eps: float = 1e-3):
        super().__init__()
        self.bn_eps = bn_eps
        self.Conv3d_1a_7x7 = Unit(3, 64, kernel=(7, 7, 7), stride=_TWO, eps=bn_eps)
        self.Conv3d_2b_1x1 = Unit(64, 64, eps=bn_eps)
        self.Conv3d_2c_3x3 = Unit(64, 192, kernel=_THREE, eps=bn_eps)
        for name, widths in _MIXED.items():
            self.add_module(name, Mixed(widths, eps=bn_eps))
        self.logits = Logits()
        self.eval().requires_grad_(False)

    def forward(self, video: Tensor) -> Tensor:
        """video float32 (B,3,T,224,224) in [-1,1], T >= 9 -> logits (B,400) before the softmax, mean over time.

        9 to 16 frames are one step of time, 17 to 24 two. Raises ValueError for other shapes and lower precision.
        """
        return self.features(video)

    def features(self, video: Tensor, *, layer: Layer = "logits400") -> Tensor:
        """`forward`, or with "pool1024" what the logits are made of, (B,1024), mean over time too."""
        if video.dim() != 5 or video.shape[1] != 3 or video.shape[3:] != (SIZE, SIZE):
            raise ValueError(f"I3D takes (B, 3, T, {SIZE}, {SIZE}), not {tuple(video.shape)}")
        if video.shape[2] < MIN_FRAMES:
            raise ValueError(f"I3D takes {MIN_FRAMES} frames or more, not {video.shape[2]}")
        if video.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"I3D takes float32, not {video.dtype}: a Frechet distance needs its digits")
        pooled = F.avg_pool3d(self.maps(video), (2, 7, 7), stride=1)
        if layer == "pool1024":
            return pooled.mean(dim=2).flatten(1)
        return self.logits(pooled).mean(dim=2).flatten(1)

    def maps(self, video: Tensor) -> Tensor:
        """(B,3,T,H,W) of any size -> (B,1024,t,h,w), where t is T/8 and h is H/32, rounded up at each halving."""
        x = self.Conv3d_1a_7x7(video)
        x = max_pool_same(x, kernel=_FLAT_THREE, stride=_FLAT_TWO)
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        x = max_pool_same(x, kernel=_FLAT_THREE, stride=_FLAT_TWO)
        x = self._mixed(x, "3b", "3c")
        x = max_pool_same(x, kernel=_THREE, stride=_TWO)
        x = self._mixed(x, "4b", "4c", "4d", "4e", "4f")
        x = max_pool_same(x, kernel=_TWO, stride=_TWO)
        return self._mixed(x, "5b", "5c")

    def _mixed(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self.get_submodule(f"Mixed_{name}")(x)
        return x


@dataclass(frozen=True)
class Loaded:
    """An I3D from a file; `metric` is what FVD by it is called ("fvd", or "fvd_i3d_imagenet" by other weights).

    `warning` is "" for a published file, byte for byte, and else a sentence to print and to record.
    """

    net: I3D
    metric: str
    sha256: str
    warning: str = ""


def load_i3d(path: str | Path, *, bn_eps: float = 1e-3) -> Loaded:
    """The network with the weights of one of the published files, see `read_i3d_file`, on the CPU in float32.

    Raises UserError, which names the file, for what is missing, damaged, another network, or weights of unknown origin.
    """
    path = Path(path)
    file = read_i3d_file(path)
    with torch.device("meta"):  # the file's tensors become the network's, so none are drawn
        net = I3D(bn_eps=bn_eps)
    specs = net.state_dict()
    counters = {name: torch.zeros((), dtype=torch.int64) for name in specs if name.endswith(COUNTER)}
    if wrong := sorted((specs.keys() - counters.keys()) ^ file.tensors.keys()):
        lacks = "lacks" if wrong[0] in specs else "has also"
        raise UserError(f"{path} is not all of an I3D, or more than one: it {lacks} {wrong[0]}; {GIVE}")
    tensors = {name: _checked(path, name, tensor, specs[name]) for name, tensor in file.tensors.items()}
    net.load_state_dict(tensors | counters, assign=True)
    return Loaded(net, file.metric, file.sha256, file.warning)


def _checked(path: Path, name: str, theirs: Tensor, spec: Tensor) -> Tensor:
    """A float32 copy, which no longer is a view of the file."""
    if theirs.shape != spec.shape:
        raise UserError(f"{path} is another I3D: {name} is {tuple(theirs.shape)}, not {tuple(spec.shape)}; {GIVE}")
    if not theirs.is_floating_point() or not theirs.isfinite().all():
        raise UserError(f"{path} is damaged: {name} does not hold plain numbers; download it again")
    return theirs.detach().to(torch.float32, copy=True).contiguous()
