"""A CLIP of two layers under open_clip's names, with and without quick-GELU, and its files of every kind."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import factory
from torch import Tensor, nn

GELU, QUICK = "tiny-clip", "tiny-clip-quickgelu"
CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
CONFIGS = {GELU: CONFIG, QUICK: {**CONFIG, "quick_gelu": True}}


@contextmanager
def known_to_open_clip(folder: Path) -> Iterator[None]:
    """open_clip knows both models inside, and as few as before after."""
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    try:
        yield
    finally:
        factory._MODEL_CONFIG_PATHS.remove(folder)
        for name in CONFIGS:
            factory._MODEL_CONFIGS.pop(name)


def make(name: str) -> Any:
    """The model with numbers large enough for an activation to matter; linear layers in half precision for QUICK."""
    torch.manual_seed(0)
    net = open_clip.CLIP(**CONFIGS[name])
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3, generator=generator)
    if name == QUICK:
        open_clip.model.convert_weights_to_lp(net)
        net.float()
    return net.eval()


class _Archived(nn.Module):
    """What OpenAI's archives are: tensors under CLIP's names, three numbers among them, and code."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        for name, tensor in state.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_buffer(last, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x


def write_archive(path: Path, state: dict[str, Tensor]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(_Archived(state)), str(path))
    return path


def openai_state(net: Any) -> dict[str, Tensor]:
    """The state that OpenAI would publish: linear layers as float16, and the three numbers."""
    half = open_clip.CLIP(**CONFIGS[QUICK])
    open_clip.model.convert_weights_to_lp(half)
    half.load_state_dict(net.state_dict())
    numbers = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    return {**half.state_dict(), **{name: torch.tensor(number) for name, number in numbers.items()}}
