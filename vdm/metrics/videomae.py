"""VideoMAE-v2-g, fine-tuned on Something-Something V2: features of clips' motion more than of their look, and actions.

Wang et al. 2023 (VideoMAE V2, arXiv:2303.16727). The Frechet distance of its features is the content-debiased FVD of
Ge et al. 2024 (arXiv:2404.12391), which I3D's, trained to know scenes, is not.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm.errors import UserError
from vdm.metrics.checks import require_frames
from vdm.metrics.precision import full_precision
from vdm.metrics.vit import Block
from vdm.weights import SUFFIX, Weights, fill, open_weights, sha256

FILE = "vit_g_hybrid_pt_1200e_ssv2_ft.pth"
NUM_FRAMES = 16
NUM_CLASSES = 174  # templates, in the order of the data set's labels.json
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, by which it was fine-tuned
_AT_ONCE = 2  # clips that go through the network together


class _Tubes(nn.Module):
    def __init__(self, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv3d(3, width, (2, patch, patch), stride=(2, patch, patch))

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.proj(x)
        return embedded


class VideoMae(nn.Module):
    """Clips (B, 3, T, H, W) -> (B, width): the norm of the mean over all tokens of the last layer.

    `head` makes logits (B, NUM_CLASSES) of that.

    A token is 2 frames x `patch` x `patch` pixels; tokens are numbered in time, then down, then across, and their
    position is the sines and cosines of that one number.
    """

    def __init__(
        self,
        *,
        width: int = 1408,
        depth: int = 40,
        heads: int = 16,
        hidden: int = 6144,
        patch: int = 14,
        size: int = 224,
    ):
        super().__init__()
        self.size = size
        self.patch_embed = _Tubes(width, patch)
        self.blocks = nn.ModuleList(Block(width, heads=heads, hidden=hidden) for _ in range(depth))
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, clips: Tensor) -> Tensor:
        x = self.patch_embed(clips).flatten(2).transpose(1, 2)  # (B, L, D)
        x = x + sinusoids(x.shape[1], x.shape[2]).to(x)
        for block in self.blocks:
            x = block(x)
        pooled: Tensor = self.fc_norm(x.mean(1))
        return pooled


def sinusoids(num: int, width: int) -> Tensor:
    """(num, width) float64: sin in even and cos in odd columns, of n / 10000^(2 floor(i / 2) / width)."""
    columns = torch.arange(width, dtype=torch.float64).div(2, rounding_mode="floor")
    angles = torch.arange(num, dtype=torch.float64)[:, None] / 10000 ** (2 * columns / width)
    return torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos())


@dataclass(frozen=True)
class VideoMaeFeatures:
    """VideoMAE-v2-g as a detector. `load_videomae` makes it."""

    net: VideoMae
    sha256: str
    device: torch.device

    def features(self, clips: Tensor) -> Tensor:
        """Clips uint8 RGB (B, 16, H, W, 3) -> (B, 1408) float32 on the CPU.

        Squashed to 224 x 224, bilinear without antialiasing, /255 and not normalised further, as cd-fvd has it. Raises
        ValueError for other shapes or dtypes, and where a feature is NaN or infinite.
        """
        return self._of_each(clips, self.net)

    def logits(self, clips: Tensor) -> Tensor:
        """Clips uint8 RGB (B, 16, H, W, 3) -> (B, 174) float32 on the CPU: how likely each action is.

        Squashed as for `features`, and normalised by ImageNet's mean and deviation, as in fine-tuning. Raises alike.
        """
        mean, std = (torch.tensor(numbers, device=self.device).view(3, 1, 1, 1) for numbers in (MEAN, STD))
        return self._of_each(clips, lambda pixels: self.net.head(self.net((pixels - mean) / std)))

    def _of_each(self, clips: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        require_frames(clips)
        if clips.shape[1] != NUM_FRAMES:
            raise ValueError(f"VideoMAE takes clips of {NUM_FRAMES} frames, got {clips.shape[1]}")
        with full_precision(self.device):
            parts = clips.split(_AT_ONCE)
            found = torch.cat([network(_pixels(part.to(self.device), self.net.size)).cpu() for part in parts])
        if not found.isfinite().all():
            raise ValueError("a feature is NaN or infinite; a clip or the weights are damaged")
        return found


def _pixels(clips: Tensor, size: int) -> Tensor:
    """uint8 (B, T, H, W, 3) -> float32 (B, 3, T, size, size) in [0, 1]."""
    frames = clips.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    resized = F.interpolate(frames, size=(size, size), mode="bilinear", align_corners=False)
    return resized.unflatten(0, clips.shape[:2]).transpose(1, 2)


def load_videomae(path: str | Path, *, device: str = "cpu") -> VideoMaeFeatures:
    """The file vit_g_hybrid_pt_1200e_ssv2_ft.pth, 1.0e9 parameters: 4 GB of memory in float32.

    Raises UserError where it is not there, or another file.
    """
    path = Path(path)
    weights = _as_ours(_read(path), path)
    with torch.device("meta"):  # no time is spent on numbers that are replaced
        net = VideoMae()
    net = net.to_empty(device="cpu")
    fill(net, weights, source=str(path))
    return VideoMaeFeatures(net.eval().requires_grad_(False).to(device), sha256(path), torch.device(device))


def _read(path: Path) -> Weights:
    """The tensors of a file that holds them under "model" or "module", or plain."""
    if not path.is_file():
        raise UserError(f"VideoMAE weights {path} do not exist; give the file of {FILE}")
    if path.suffix == SUFFIX:
        return open_weights(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged, or holds more than tensors, and vdm reads nothing but these; download it again, or "
            f"save the tensors of its entry `module` as {SUFFIX}"
        ) from error
    for key in ("model", "module"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path} holds no weights by name; give the file of {FILE}")
    return Weights.of(state)


def _as_ours(weights: Weights, path: Path) -> Weights:
    """With one bias for query, key and value; the file has none for the key."""
    stems = [name.removesuffix(".q_bias") for name in weights if name.endswith(".attn.q_bias")]
    if not stems or not {"fc_norm.weight", "head.weight"} <= weights.keys():
        raise UserError(f"{path} is not a VideoMAE that was fine-tuned; give the file of {FILE}")
    biases = {}
    for stem in stems:
        query, value = weights[f"{stem}.q_bias"], weights.get(f"{stem}.v_bias")
        if value is None:
            raise UserError(f"{path}: there is no {stem}.v_bias; give the file of {FILE}")
        biases[f"{stem}.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return weights.renamed(lambda name: None if name.endswith((".q_bias", ".v_bias")) else name).updated(biases)
