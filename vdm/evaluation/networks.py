"""Extractors that are networks: I3D, C3D, CLIP, DINO, and the small classifier of mini-something.

Clips go through one at a time, so no row depends on its batch, nor on how many processes share the clips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vdm.data.transforms import Frames, resize
from vdm.errors import UserError
from vdm.evaluation.clips import Shape
from vdm.evaluation.extract import Opened, Rows
from vdm.evaluation.options import USUAL, Options
from vdm.metrics.c3d import C3D, MEAN_FILE, c3d_logits, load_c3d
from vdm.metrics.clip import CLIP_SCORE_PREFIX, Clip, clip_score, clipsim, load_clip
from vdm.metrics.clip_files import config_beside
from vdm.metrics.consistency import background_consistency, subject_consistency
from vdm.metrics.fvd import i3d_features, repeats
from vdm.metrics.i3d import load_i3d
from vdm.metrics.i3d_files import FVD, IMAGENET
from vdm.metrics.precision import full_precision
from vdm.metrics.toy import FEATURES, SHIPPED, SIZE, load_toy_classifier
from vdm.metrics.videomae import VideoMaeFeatures, load_videomae
from vdm.metrics.vit import load_dino
from vdm.weights import sha256

TEXTS = 64  # that are read at a time
CLIP_COLUMNS = ("clipsim", "clip_score", "background_consistency")  # then the mean frame, then the text


def each(function: Callable[[Tensor, str], Tensor]) -> Callable[[Frames, Sequence[str]], Rows]:
    """Rows of a function of one clip, uint8 (1,T,H,W,3), and its prompt, which gives (D,)."""

    def rows(frames: Frames, prompts: Sequence[str]) -> Rows:
        clips = torch.from_numpy(np.ascontiguousarray(frames))
        return torch.stack([function(clips[i : i + 1], prompt) for i, prompt in enumerate(prompts)]).cpu().numpy()

    return rows


def open_i3d(path: Path | None, device: torch.device, shape: Shape, options: Options = USUAL) -> Opened:
    """The 400 logits of the network that FVD is defined by."""
    return _open_i3d(path, device, shape, options, FVD)


def open_i3d_imagenet(path: Path | None, device: torch.device, shape: Shape, options: Options = USUAL) -> Opened:
    """The same network with the weights that began from ImageNet."""
    return _open_i3d(path, device, shape, options, IMAGENET)


def _open_i3d(path: Path | None, device: torch.device, shape: Shape, options: Options, metric: str) -> Opened:
    assert path is not None
    loaded = load_i3d(path, bn_eps=options.bn_eps)
    if loaded.metric != metric:
        raise UserError(
            f"{path} holds the weights of {loaded.metric}, not of {metric}; name the file as it was given out"
        )
    net = loaded.net.to(device)
    protocol = options.of_i3d(repeat=repeats(shape.num_frames))
    record = {key: getattr(protocol, key) for key in ("resize", "interp", "layer", "bn_eps", "repeat")}
    rows = each(lambda clip, prompt: i3d_features(clip, net, protocol=protocol)[0])
    return Opened(rows, {**record, "dtype": "float32"}, loaded.sha256, loaded.warning)


def open_c3d(path: Path | None, device: torch.device, shape: Shape) -> Opened:
    """The 101 logits by which the Inception score of videos is published."""
    assert path is not None
    net = load_c3d(path)
    net.net.to(device)
    rows = each(lambda clip, prompt: c3d_logits(clip, net)[0])
    protocol = {"layer": "logits101", "resize": "squash", "dtype": "float32"}
    if isinstance(net.net, C3D):  # the other layout has its mean clip within
        protocol["mean_sha256"] = sha256(path.with_name(MEAN_FILE))
    return Opened(rows, protocol, net.sha256)


def open_clip(path: Path | None, device: torch.device, shape: Shape, options: Options = USUAL) -> Opened:
    """CLIP_COLUMNS, then the unit vectors of the mean frame and of the prompt."""
    assert path is not None
    clip = load_clip(path, fit=options.clip_resize, device=str(device))

    def row(frames: Tensor, prompt: str) -> Tensor:
        found, texts = clip.frames(frames), clip.texts([prompt, CLIP_SCORE_PREFIX + prompt])
        as_vbench = clip.frames(frames, antialias=False)
        middle = found.double().mean(1)
        scores = [clipsim(found, texts[:1]), clip_score(found, texts[1:]), background_consistency(as_vbench)]
        return torch.cat([*(score.double() for score in scores), (middle / middle.norm())[0], texts[0].double()])

    protocol = {"layer": clip.model, "resize": clip.fit, "interp": "bicubic aa", "dtype": "float32"}
    config = config_beside(path)
    pixels = {"mean": list(clip.net.mean), "std": list(clip.net.std), "quick_gelu": clip.net.quick_gelu}
    beside = {"config_sha256": sha256(config) if config else None}
    return Opened(each(row), {**protocol, **pixels, **beside}, clip.sha256, texts=Texts(clip))


class Texts:
    """Unit vectors (n,D) of texts, on the CPU; each distinct text is read once."""

    def __init__(self, clip: Clip):
        self._clip = clip
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = sorted(set(texts) - self._known.keys())
        starts = range(0, len(new), TEXTS)
        for start in tqdm(starts, desc="prompts to choose from", unit_scale=TEXTS, disable=len(new) < 20 * TEXTS):
            part = new[start : start + TEXTS]
            # As many at a time always, so that no vector depends on how many others are asked for.
            vectors = self._clip.texts([*part, *[part[-1]] * (TEXTS - len(part))])
            self._known |= dict(zip(part, vectors, strict=False))
        return torch.stack([self._known[text] for text in texts])


def open_dino(path: Path | None, device: torch.device, shape: Shape) -> Opened:
    """Subject consistency, (B,1)."""
    assert path is not None
    dino = load_dino(path, device=str(device))
    rows = each(lambda clip, prompt: subject_consistency(dino.frames(clip)))
    return Opened(rows, {"layer": "DINO ViT-B/16", "interp": "bilinear", "dtype": "float32"}, dino.sha256)


def open_videomae(path: Path | None, device: torch.device, shape: Shape) -> Opened:
    """The 1408 features of the content-debiased Frechet distance."""
    assert path is not None
    net = _videomae(path, str(device))
    protocol = {"layer": "fc_norm1408", "resize": "squash", "interp": "torch", "dtype": "float32"}
    return Opened(each(lambda clip, prompt: net.features(clip)[0]), protocol, net.sha256)


def open_ssv2(path: Path | None, device: torch.device, shape: Shape) -> Opened:
    """The same network's 174 logits of Something-Something's templates."""
    assert path is not None
    net = _videomae(path, str(device))
    protocol = {"layer": "logits174", "resize": "squash", "interp": "torch", "dtype": "float32"}
    return Opened(each(lambda clip, prompt: net.logits(clip)[0]), protocol, net.sha256)


def release() -> None:
    """Let go of the network that extractors share."""
    _videomae.cache_clear()


@lru_cache(maxsize=1)
def _videomae(path: Path, device: str) -> VideoMaeFeatures:
    """Two extractors share it, for it takes 4 GB."""
    return load_videomae(path, device=device)


def open_toy(path: Path | None, device: torch.device, shape: Shape) -> Opened:
    """The 128 features of the classifier of mini-something, then its 16 logits."""
    net = load_toy_classifier().to(device)

    def row(clip: Tensor, prompt: str) -> Tensor:
        small = np.stack([resize(frame, SIZE, SIZE) for frame in clip[0].numpy()])
        with full_precision(device):
            judged = net(torch.from_numpy(small)[None].to(device))
        return torch.cat([judged.features[0], judged.logits[0]])

    protocol = {"layer": f"features{FEATURES}", "resize": "squash", "interp": "area", "dtype": "float32"}
    return Opened(each(row), protocol, sha256(SHIPPED))
