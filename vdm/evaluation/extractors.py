"""What makes rows of clips: each extractor by name, what it needs, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from vdm.evaluation import networks, pixels, verdicts
from vdm.evaluation.clips import Shape
from vdm.evaluation.extract import Opened
from vdm.evaluation.options import USUAL, Options
from vdm.files import is_file
from vdm.metrics import videomae
from vdm.metrics.toy import SHIPPED

THUMBNAIL = "thumbnail"
MOST_FRAMES = 10**9


@dataclass(frozen=True)
class Extractor:
    """`files` are the names that its weights may have, of which one is enough; empty where it needs none. `open` gets
    the one that is there, else None; `shipped` is one that comes with vdm. Clips must have at least `frames[0]`, at
    most `frames[1]` frames, and `side` pixels a side."""

    open: Callable[[Path | None, torch.device, Shape], Opened]
    files: tuple[str, ...] = ()
    frames: tuple[int, int] = (1, MOST_FRAMES)
    side: int = 1
    shipped: Path | None = None

    def find(self, weights_dir: Path) -> Path | None:
        """The first of its files that is there."""
        return next((weights_dir / name for name in self.files if is_file(weights_dir / name)), None)

    def missing(self, weights_dir: Path, shape: Shape) -> str:
        """Why it cannot be opened, or not for clips of this shape; "" where it can."""
        if self.files and self.find(weights_dir) is None:
            others = f" ({' or '.join(self.files[1:])} will do as well)" if len(self.files) > 1 else ""
            return f"needs {self.files[0]}, put it at {weights_dir / self.files[0]}{others}"
        if self.shipped is not None and not is_file(self.shipped):
            return f"needs {self.shipped.name}, which comes with vdm; install it anew"
        least, most = self.frames
        if not least <= shape.num_frames <= most:
            span = f"{least}" if least == most else f"{least} or more" if most == MOST_FRAMES else f"{least} to {most}"
            return f"needs clips of {span} frames, and these have {shape.num_frames}"
        if min(shape.height, shape.width) < self.side:
            return f"needs frames of {self.side} pixels a side or more, and these have {shape.width}x{shape.height}"
        return ""


I3D_FILES = ("i3d_torchscript.pt", "i3d_pretrained_400.pt")
IMAGENET_FILES = ("rgb_imagenet.pt", "model_rgb.pth")


def extractors(options: Options) -> dict[str, Extractor]:
    """All by name, with these choices of protocol."""
    i3d, imagenet, clip = (
        partial(opened, options=options)
        for opened in (networks.open_i3d, networks.open_i3d_imagenet, networks.open_clip)
    )
    return {
        THUMBNAIL: Extractor(pixels.open_thumbnails),
        "frames": Extractor(pixels.open_frames, frames=(2, MOST_FRAMES), side=11),
        "flows": Extractor(pixels.open_flows, frames=(3, MOST_FRAMES), side=16),
        "judge": Extractor(verdicts.open_judge, frames=(2, MOST_FRAMES)),
        "toy": Extractor(networks.open_toy, shipped=SHIPPED),
        "i3d": Extractor(i3d, I3D_FILES, frames=(9, MOST_FRAMES)),
        "i3d_rep2": Extractor(i3d, I3D_FILES, frames=(5, 8)),
        "i3d_imagenet": Extractor(imagenet, IMAGENET_FILES, frames=(9, MOST_FRAMES)),
        "videomae": Extractor(
            networks.open_videomae, (videomae.FILE,), frames=(videomae.NUM_FRAMES, videomae.NUM_FRAMES)
        ),
        "ssv2": Extractor(networks.open_ssv2, (videomae.FILE,), frames=(videomae.NUM_FRAMES, videomae.NUM_FRAMES)),
        "c3d": Extractor(networks.open_c3d, ("c3d_ucf101.pt", "conv3d_deepnetA_ucf.npz"), frames=(16, 16)),
        "clip": Extractor(clip, ("ViT-B-32.pt", "open_clip_model.safetensors"), frames=(2, MOST_FRAMES)),
        "dino": Extractor(networks.open_dino, ("dino_vitbase16_pretrain.pth",), frames=(2, MOST_FRAMES)),
    }


EXTRACTORS = extractors(USUAL)
