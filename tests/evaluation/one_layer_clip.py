"""A CLIP of one layer with weights from a seed, for the tests of what an evaluation makes of its vectors."""

from __future__ import annotations

from typing import Any

import open_clip
import torch

from vdm.metrics.clip_files import ClipNet

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


def make_net() -> ClipNet:
    torch.manual_seed(0)
    return ClipNet(open_clip.CLIP(**CONFIG).eval(), "tiny", quick_gelu=False)
