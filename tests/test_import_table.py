"""Who may import whom. The parts of vdm do not know each other; they meet in the modules above them."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("data", "text", "models", "diffusion", "metrics")
LEAVES = ("vdm.errors", "vdm.files", "vdm.templates", "vdm.vocabulary", "vdm.webpage", "vdm.weights")
# What these may import of vdm, besides themselves. A module that is not named here may import what it needs.
MAY_IMPORT = {
    **{f"vdm.{part}": LEAVES for part in PARTS},
    **{leaf: () for leaf in LEAVES},
    "vdm.weights": ("vdm.errors",),
    "vdm.files": ("vdm.errors",),
    "vdm.webpage": ("vdm.files",),
    "vdm.spelling": ("vdm.errors",),
    "vdm.training.settings": ("vdm.errors",),
    "vdm.checkpoint": ("vdm.errors", "vdm.weights", "vdm.__version__"),
    "kernels": (),
}
NEVER = ("diffusers", "transformers")


@dataclass(frozen=True)
class Import:
    """One imported name, dotted and absolute, such as vdm.errors.UserError."""

    name: str
    line: int
    at_import_time: bool


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def module_name(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def find_imports(node: ast.AST, package: str, *, at_import_time: bool = True) -> Iterator[Import]:
    """Every import below a node; `package` is what a relative import starts from."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_import_time) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            base = ".".join([*start, *filter(None, [child.module])])
            yield from (Import(f"{base}.{alias.name}", child.lineno, at_import_time) for alias in child.names)
        elif isinstance(child, ast.Attribute) and ast.unparse(child).startswith("torch.distributed"):
            yield Import("torch.distributed", child.lineno, at_import_time)
        else:
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(child)
            yield from find_imports(child, package, at_import_time=at_import_time and not later)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def read_imports(file: Path, root: Path) -> list[Import]:
    name = module_name(file, root)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    return list(find_imports(ast.parse(file.read_text(encoding="utf-8")), package))


def source_files(root: Path) -> list[Path]:
    scripts = [root / name for name in ("train.py", "sample.py") if (root / name).exists()]
    return [*scripts, *sorted((root / "vdm").rglob("*.py")), *sorted((root / "kernels").rglob("*.py"))]


def problem(module: str, imported: Import) -> str | None:
    """What is wrong with one import, if anything is."""
    name = imported.name
    if within(name, *NEVER):
        return "is for the tests only"
    if within(name, "kernels") and not within(module, "kernels", "vdm.models"):
        return "is for vdm.models only"
    if within(name, "kernels") and not within(module, "kernels") and imported.at_import_time:
        return "is to be imported in the branch that uses it"
    if within(name, "torch.distributed") and within(module, "vdm.models"):
        return "is applied to models from outside"
    if within(name, "vdm"):
        for package, allowed in MAY_IMPORT.items():
            if within(module, package) and not within(name, package, *allowed):
                return f"is not for {package}"
    return None


def violations(root: Path) -> list[str]:
    """One line for each import that the table forbids, and one if kernels/__init__.py holds more than a docstring."""
    found = [
        f"{file.relative_to(root)}:{imported.line}: {imported.name} {reason}"
        for file in source_files(root)
        for imported in read_imports(file, root)
        if (reason := problem(module_name(file, root), imported))
    ]
    door = ast.parse((root / "kernels" / "__init__.py").read_text(encoding="utf-8"))
    if len(door.body) != 1 or ast.get_docstring(door) is None:
        found.append("kernels/__init__.py: must be a docstring and nothing else, or transformers takes it for another")
    return found


def test_the_repository_keeps_to_the_table() -> None:
    assert violations(ROOT) == []


def test_no_module_imports_itself_in_a_circle() -> None:
    files = {module_name(file, ROOT): file for file in source_files(ROOT)}
    graph = {
        module: {
            known
            for imported in read_imports(file, ROOT)
            for known in (imported.name, imported.name.rpartition(".")[0])
            if known in files and known != module and imported.at_import_time
        }
        for module, file in files.items()
    }
    for package in (name for name, file in files.items() if file.name == "__init__.py"):
        for module in graph:
            if within(module, package):  # `from vdm.models.layers import x` names the package that holds the reader too
                graph[module].discard(package)
    list(graphlib.TopologicalSorter(graph).static_order())


PLANTED = [
    ("vdm/data/x.py", "from vdm.models import UNet3D"),
    ("vdm/data/x.py", "import vdm.diffusion.schedule"),
    ("vdm/data/x.py", "from vdm import text"),
    ("vdm/data/x.py", "from ..models import unet"),
    ("vdm/text/x.py", "from vdm.config import load"),
    ("vdm/models/x.py", "def f():\n    from vdm.training.loop import train"),
    ("vdm/diffusion/x.py", "if TYPE_CHECKING:\n    from vdm.models import UNet3D"),
    ("vdm/metrics/deep/x.py", "from vdm.data.video import read_clip"),
    ("vdm/metrics/x.py", "from vdm.checkpoint import verify"),
    ("vdm/errors.py", "import vdm.vocabulary"),
    ("vdm/training/settings.py", "from vdm.config import Config"),
    ("vdm/models/x.py", "import torch.distributed as dist"),
    ("vdm/models/x.py", "from torch import distributed"),
    ("vdm/models/x.py", "import torch\nprint(torch.distributed.get_rank())"),
    ("vdm/models/x.py", "from kernels.temporal_attention import temporal_attention"),
    ("vdm/models/x.py", "class C:\n    import kernels"),
    ("vdm/training/x.py", "def f():\n    import kernels.temporal_attention"),
    ("vdm/pipeline.py", "def f():\n    from transformers import CLIPTextModel"),
    ("vdm/interop/x.py", "import diffusers"),
    ("train.py", "import transformers.models"),
    ("sample.py", "from diffusers import DDIMScheduler"),
    ("kernels/x.py", "from vdm.errors import UserError"),
    ("kernels/__init__.py", "import os"),
    ("kernels/__init__.py", '"""Kernels."""\n__version__ = "0.1.0"'),
]
HARMLESS = [
    ("vdm/data/x.py", "from vdm.data.clips import frame_indices\nfrom . import clips\nimport vdm.errors"),
    ("vdm/metrics/x.py", "import vdm.vocabulary\nfrom ..vocabulary import SHAPES\nimport databases"),
    ("vdm/models/x.py", "import torch\ndef f():\n    from kernels.temporal_attention import temporal_attention"),
    ("vdm/pipeline.py", "import vdm.models\nfrom vdm import data, diffusion, text\nimport transformers_like"),
    ("vdm/training/x.py", "import torch.distributed\nfrom vdm.config import Config"),
    ("kernels/x.py", "import torch.distributed\nfrom kernels import reference"),
]


def plant(root: Path, file: str, source: str) -> None:
    """A repository of one module."""
    (root / "kernels").mkdir()
    (root / "kernels" / "__init__.py").write_text('"""Kernels."""\n')
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


@pytest.mark.parametrize(("file", "source"), PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str) -> None:
    plant(tmp_path, file, source)
    assert len(violations(tmp_path)) == 1, violations(tmp_path)
    assert violations(tmp_path)[0].startswith(file)


@pytest.mark.parametrize(("file", "source"), HARMLESS)
def test_what_is_allowed_is_not_flagged(tmp_path: Path, file: str, source: str) -> None:
    plant(tmp_path, file, source)
    assert violations(tmp_path) == []


@pytest.mark.parity
def test_transformers_imports_from_our_root() -> None:
    """transformers probes for a package called kernels, and from here it finds ours."""
    code = "import kernels; from transformers import CLIPTextModel; print(kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py")
