"""vdm: text-to-video latent diffusion of human actions, from scratch in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vdm.pipeline import TextToVideo

__version__ = "0.1.0"
__all__ = ["TextToVideo", "__version__"]


def __getattr__(name: str) -> object:
    """Import the pipeline on first use, so that `import vdm` alone does not pay for torch."""
    if name == "TextToVideo":
        from vdm.pipeline import TextToVideo

        return TextToVideo
    raise AttributeError(f"module 'vdm' has no attribute {name!r}")
