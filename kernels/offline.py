"""What the kernels take of a GPU, found without one: compiled for its architecture, and assembled by Triton's ptxas.

`python -m kernels.offline [bf16 fp16 fp32]` prints a table. TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import add_layer_norm, geglu, group_norm
from kernels import temporal_attention as attention

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
ARCHITECTURES = (80, 90)
SHAPES = ((16, 64), (24, 64), (64, 64), (16, 40), (24, 128))  # frames, head width


def ptxas() -> str | None:
    """The assembler that Triton brings along, or None."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return str(path) if path.is_file() else None


def resources(kernel, arguments: Mapping[str, object], *, arch: int) -> dict[str, int]:
    """`registers` of a thread, `spills` (bytes) and `shared` (bytes of a program) of a kernel called with `arguments`.

    Pointers are aligned as allocations are; whole numbers count as divisible by 16 where they are, as in a launch.
    """
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = f"*{NAMES[value]}" if isinstance(value, torch.dtype) else "i32"
        if isinstance(value, torch.dtype) or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {**_assembled(compiled.asm["ptx"], arch), "shared": compiled.metadata.shared}


def _assembled(ptx: str, arch: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        name = "sm_90a" if arch == 90 else f"sm_{arch}"
        command = [str(ptxas()), "-v", f"--gpu-name={name}", "kernel.ptx", "-o", "kernel.cubin"]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    registers, stores, loads = (
        re.search(rf"(\d+) {what}", said) for what in ("registers", "bytes spill stores", "bytes spill loads")
    )
    assert registers and stores and loads, said
    return {"registers": int(registers[1]), "spills": int(stores[1]) + int(loads[1])}


def attention_resources(
    frames: int, head_dim: int, dtype: torch.dtype, *, backward: bool, arch: int, masked: bool = False
) -> dict[str, int]:
    """`resources` of temporal attention on the packed output of a projection to 5 heads, at 1,024 positions."""
    qkv = torch.empty(2, frames, 1024, 3, 5, head_dim, dtype=dtype, device="meta")
    arguments: dict[str, object] = attention.constants(qkv, masked=masked, scale=head_dim**-0.5, backward=backward)
    arguments |= {name: dtype for name in ("qkv", "mask", "out", "grad", "dqkv")}
    arguments |= {"F": frames, "P": 1024, "H": 5, "mask_sb": frames, "mask_sf": 1}
    arguments |= dict(zip(("sb", "sf", "sp", "sj", "sh", "sd"), qkv.stride(), strict=True))
    arguments |= dict(zip(("gb", "gf", "gp", "gh", "gd"), qkv[:, :, :, 0].contiguous().stride(), strict=True))
    kernel = attention._backward_kernel if backward else attention._forward_kernel
    return resources(kernel, arguments, arch=arch)


def geglu_resources(width: int, dtype: torch.dtype, *, backward: bool, arch: int) -> dict[str, int]:
    """`resources` of the gate on a projection to 2 * `width` channels."""
    arguments: dict[str, object] = geglu.constants(width, dtype)
    arguments |= {name: dtype for name in ("x", "out", "grad", "dx")}
    arguments |= {"R": 4096, "W": width, "sr": 2 * width, "sw": 1, "gr": width, "gw": 1}
    return resources(geglu._backward_kernel if backward else geglu._forward_kernel, arguments, arch=arch)


def group_norm_resources(channels: int, dtype: torch.dtype, *, backward: bool, arch: int) -> dict[str, int]:
    """`resources` of GroupNorm and SiLU of 16 frames of 1,024 positions: the larger number of its kernels' each."""
    wide, tiles = group_norm.accumulator(dtype), group_norm.constants(dtype)
    strides = dict(zip(("n", "r", "c"), (1024 * channels, channels, 1), strict=True))
    arguments: dict[str, object] = {name: dtype for name in ("x", "y", "grad", "dx")} | tiles | {"SILU": True}
    arguments |= {name: wide for name in ("mean", "rstd", "parts", "plain", "weighted")}
    arguments |= {"weight": torch.float32, "bias": torch.float32, "R": 1024, "C": channels, "S": 2, "rows": 512}
    arguments |= {"G": 32, "W": channels // 32, "EPS": 1e-5} | group_norm.constants_of_groups(dtype, channels // 32)
    arguments |= {f"{which}{axis}": stride for which in "sg" for axis, stride in strides.items()}
    if backward:
        kernels = (group_norm._sums_kernel, group_norm._means_kernel, group_norm._backward_kernel)
    else:
        kernels = (group_norm._moments_kernel, group_norm._statistics_kernel, group_norm._apply_kernel)
    found = [resources(kernel, arguments, arch=arch) for kernel in kernels]
    return {name: max(one[name] for one in found) for name in found[0]}


def add_layer_norm_resources(channels: int, dtype: torch.dtype, *, backward: bool, arch: int) -> dict[str, int]:
    """`resources` of a residual sum and its LayerNorm."""
    wide = group_norm.accumulator(dtype)
    arguments: dict[str, object] = add_layer_norm.constants(channels, dtype) | {"EPS": 1e-5}
    arguments |= {name: dtype for name in ("x", "branch", "total", "y", "dtotal", "dy", "dx")}
    arguments |= {name: wide for name in ("mean", "rstd", "parts")}
    arguments |= {"weight": torch.float32, "bias": torch.float32, "R": 16384, "rows": 32}
    arguments |= {name: channels for name in ("xr", "br", "tr", "yr")} | {name: 1 for name in ("xc", "bc", "tc", "yc")}
    kernel = add_layer_norm._backward_kernel if backward else add_layer_norm._forward_kernel
    return resources(kernel, arguments, arch=arch)


def others(dtype: torch.dtype, *, backward: bool, arch: int) -> Iterator[tuple[str, int, dict[str, int]]]:
    """Name, width and `resources` of every kernel but attention's, at widths of the UNet."""
    given = {"backward": backward, "arch": arch}
    yield "geglu", 1280, geglu_resources(1280, dtype, **given)
    for channels in (320, 2560):
        yield "group norm", channels, group_norm_resources(channels, dtype, **given)
    for channels in (320, 1280):
        yield "layer norm", channels, add_layer_norm_resources(channels, dtype, **given)


def table(dtypes: Sequence[torch.dtype]) -> Iterator[str]:
    """Every kernel at the widths of the UNet, a row each."""
    yield "| sm | kernel | type | frames | width | pass | registers | spilled bytes | shared bytes |"
    yield "|---" * 9 + "|"
    cases = itertools.product(ARCHITECTURES, dtypes, (False, True))
    for arch, dtype, backward in cases:
        name = "backward" if backward else "forward"
        for frames, head_dim in SHAPES:
            found = attention_resources(frames, head_dim, dtype, backward=backward, arch=arch)
            yield _row(arch, "attention", NAMES[dtype], frames, head_dim, name, *found.values())
        for kernel, width, found in others(dtype, backward=backward, arch=arch):
            yield _row(arch, kernel, NAMES[dtype], "", width, name, *found.values())


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    chosen = [dtype for dtype, name in NAMES.items() if name in (sys.argv[1:] or ("bf16", "fp16", "fp32"))]
    for line in table(chosen):
        print(line, flush=True)
