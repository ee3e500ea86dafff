"""How well frames match a text, by CLIP: CLIPSIM, its ratio to real clips, CLIPScore.

Radford et al. 2021 (CLIP, arXiv:2103.00020), Wu et al. 2021 (GODIVA, arXiv:2104.14806), Hessel et al. 2021 (CLIPScore,
arXiv:2104.08718).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from vdm.errors import Failure, UserError
from vdm.metrics.checks import require_frames, unit
from vdm.metrics.clip_files import ClipNet, open_clip_net
from vdm.metrics.clip_pixels import Fit, clip_pixels
from vdm.metrics.precision import full_precision
from vdm.weights import sha256

CLIP_SCORE_PREFIX = "A photo depicts "  # what CLIPScore puts before each text; CLIPSIM takes it as it is
_AT_ONCE = 64  # frames, or texts, that go through the network together

# OpenAI's README: CLIP.png of their repository against three texts, by softmax(100 cos).
GOLDEN_TEXTS = ("a diagram", "a dog", "a cat")
GOLDEN_PROBABILITIES = (0.9927937, 0.00421068, 0.00299572)
_GOLDEN_MODEL = "ViT-B-32-quickgelu"


@dataclass(frozen=True)
class Clip:
    """CLIP's two towers, each to unit vectors of the same space. `load_clip` makes it."""

    net: ClipNet
    sha256: str
    fit: Fit
    device: torch.device

    @property
    def model(self) -> str:
        """The name of the open_clip config, as "ViT-B-32-quickgelu"."""
        return self.net.model

    def frames(self, clips: Tensor, *, antialias: bool = True) -> Tensor:
        """Clips uint8 RGB (B, T, H, W, 3) -> unit vectors (B, T, D) float32 on the CPU, one for each frame.

        antialias=False resizes as VBench does, for its background consistency. Raises ValueError for other shapes or
        dtypes, and where a feature is NaN or infinite.
        """
        require_frames(clips)
        tower, pixels = self.net.net.visual, self.net
        features = []
        with full_precision(self.device):
            for frames in clips.flatten(0, 1).split(_AT_ONCE):  # (n, H, W, 3)
                square = clip_pixels(
                    frames[None].to(self.device),
                    size=tower.image_size[0],
                    fit=self.fit,
                    antialias=antialias,
                    mean=pixels.mean,
                    std=pixels.std,
                )
                features.append(tower(square[0]).cpu())
        return unit(torch.cat(features)).unflatten(0, clips.shape[:2])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors (B, D) float32 on the CPU. One that is too long for CLIP (77 tokens) is cut."""
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"texts must be a sequence of one or more strings, got {texts!r}")
        net = self.net.net
        tokens = SimpleTokenizer(context_length=net.context_length)(list(texts))
        with full_precision(self.device):
            features = [net.encode_text(part.to(self.device)).cpu() for part in tokens.split(_AT_ONCE)]
        return unit(torch.cat(features))


def load_clip(path: str | Path, *, model: str | None = None, fit: Fit = "crop", device: str = "cpu") -> Clip:
    """A CLIP from a file: OpenAI's .pt archive, or open_clip's .safetensors or .pt, in float32.

    `model` names the open_clip config where the file does not tell it: "ViT-B-32" has GELU, "ViT-B-32-quickgelu"
    quick-GELU, and the wrong one is wrong in silence. A file without the config of its makers is taken to want OpenAI's
    normalisation, which most do. `fit` is what becomes of frames that are not square, as in `clip_pixels`. Raises
    UserError where the file is not there, or another, or fits two models.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"CLIP weights {path} do not exist; give {_WEIGHTS}")
    net = open_clip_net(path, model=model)
    net.net.to(device).requires_grad_(False)
    return Clip(net, sha256(path), fit, torch.device(device))


_WEIGHTS = "the file of OpenAI's ViT-B-32.pt, or an open_clip_model.safetensors"


def clipsim(frames: Tensor, texts: Tensor) -> Tensor:
    """CLIPSIM of each clip: the mean over its frames of cos(frame, text), from -1 to 1.

    frames (B, T, D) and texts (B, D) unit vectors -> (B,) float64. It is not the cosine of the mean frame, which is
    larger in size the more the frames differ (GODIVA averages cosines).
    """
    return _cosines(frames, texts).mean(1)


def clip_score(frames: Tensor, texts: Tensor) -> Tensor:
    """CLIPScore of each clip: the mean over its frames of 2.5 max(cos(frame, text), 0).

    frames (B, T, D), texts (B, D) unit vectors -> (B,) float64. The texts are to be read with `CLIP_SCORE_PREFIX`.
    """
    return 2.5 * _cosines(frames, texts).clamp(min=0).mean(1)


def relative_clipsim(generated: Tensor, real: Tensor) -> float:
    """GODIVA's RM: the mean CLIPSIM of generated clips over that of real clips with the same prompts; 1 is as good.

    generated (N,), real (M,). A ratio of means, since one clip's may be divided by next to nothing. Raises ValueError
    where the real clips do not match their prompts at all (mean <= 0).
    """
    if not len(generated) or not len(real) or not real.double().mean() > 0:
        raise ValueError("relative_clipsim needs generated clips, and real ones whose mean similarity is positive")
    return (generated.double().mean() / real.double().mean()).item()


def _cosines(frames: Tensor, texts: Tensor) -> Tensor:
    """(B, T) float64, of unit vectors (B, T, D) and (B, D)."""
    if frames.dim() != 3 or texts.shape != (frames.shape[0], frames.shape[2]) or not frames.numel():
        raise ValueError(f"frames (B, T, D) and texts (B, D) do not fit: {tuple(frames.shape)}, {tuple(texts.shape)}")
    cosines = torch.einsum("btd,bd->bt", frames.double(), texts.double())
    if not cosines.isfinite().all():
        raise ValueError("a feature is NaN or infinite; a clip or the weights are damaged")
    return cosines


def selftest(clip: Clip, *, image: str | Path) -> Tensor:
    """The three probabilities of OpenAI's README, computed anew (3,) float64, for ViT-B/32 by OpenAI.

    `image` is CLIP.png of github.com/openai/CLIP. Raises Failure where one is off by more than 0.002, which the wrong
    activation, normalisation or order of channels is; UserError for another model or where the image cannot be read.
    """
    if clip.model != _GOLDEN_MODEL:
        raise UserError(f"the golden values are of {_GOLDEN_MODEL}, not of {clip.model}; give OpenAI's ViT-B-32.pt")
    pixels = cv2.imread(str(image), cv2.IMREAD_COLOR)
    if pixels is None:
        raise UserError(f"{image} cannot be read as an image; give CLIP.png of github.com/openai/CLIP")
    frames = torch.from_numpy(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))[None, None]  # (1, 1, H, W, 3)
    cosines = _cosines(clip.frames(frames).expand(3, -1, -1), clip.texts(GOLDEN_TEXTS))[:, 0]
    found = (100 * cosines).softmax(0)
    if not torch.allclose(found, found.new_tensor(GOLDEN_PROBABILITIES), rtol=0, atol=0.002):
        values = ", ".join(f"{value:.4f}" for value in found)
        wanted = ", ".join(f"{value:.4f}" for value in GOLDEN_PROBABILITIES)
        raise Failure(f"CLIP gives {values} for {image}, where OpenAI has {wanted}: weights or image are not theirs")
    return found
