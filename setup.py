"""What the package is and needs. Settings of the tools stand in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The one place that holds it is vdm/__init__.py, read as text: its imports may not be installed yet."""
    text = (HERE / "vdm" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert match, "vdm/__init__.py has no line __version__ = ..."
    return match[1]


TEST = ["pytest>=8", "pytest-cov>=5", "pytest-xdist>=3.5", "hypothesis>=6.100"]
PARITY = ["diffusers>=0.30", "transformers>=4.44", "peft>=0.13", "scikit-image>=0.22"]
TOOLS = ["ruff==0.17.6", "mypy>=1.11", "types-PyYAML"]

setup(
    name="vdm",
    version=version(),
    description="Text-to-video latent diffusion of human actions, from scratch in PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["vdm", "vdm.*", "kernels", "kernels.*"]),
    package_data={"vdm": ["assets/**", "metrics/*.safetensors"]},
    install_requires=[
        "torch>=2.6",  # the first whose FSDP2 is public
        "open_clip_torch>=3.0",
        "numpy>=1.24",
        "opencv-python>=4.8",
        "av>=17,<19",  # the first whose conversions may be told to take one thread; 19 has no metadata_errors
        "fsspec>=2024.2",  # comes with torch
        "safetensors>=0.4.3",
        "pyyaml>=6",
        "tqdm>=4.60",
        "tensorboard>=2.14",
    ],
    extras_require={"test": TEST, "parity": PARITY, "dev": [*TEST, *PARITY, *TOOLS]},
    entry_points={"console_scripts": ["vdm = vdm.cli:main"]},
)
