"""What gradient checkpointing saves and costs: `python benchmarks/memory.py` (two minutes on a CPU, under 2 GB).

The UNet of `configs/a100.yaml` in bfloat16 with fused attention is run on the meta device, where tensors have sizes and
no contents: what is kept for the backward pass, and the most that is there at a time, come from the sizes of all
storages that are alive. A smaller UNet is run on `--device`: what its allocator had at most, the time, the gradients.
`--sampling`: instead, what the public model holds while it samples in float16 on a GPU, imagined in the same way.
"""

from __future__ import annotations

import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import environment, write_json
from vdm.cli import Parser, run
from vdm.config import load
from vdm.generate import pick_device
from vdm.memory import imagined
from vdm.models import UNet3D, UNetConfig, attention, operations
from vdm.pipeline import TextToVideo, build_components
from vdm.training.parallel import checkpoint_activations
from vdm.training.settings import Recompute

ROOT = Path(__file__).resolve().parents[1]
MODES: tuple[Recompute, ...] = get_args(Recompute)
SMALL = UNetConfig(unet_dim=32, attention_head_dim=16, context_dim=128)
SHAPE = (1, 4, 8, 32, 32)  # of the smaller UNet's latents
ROUNDS = 3
SAMPLED = ((16, 256), (64, 256), (16, 512))  # frames, and pixels of a side
UNBOUND = ("text.text_weights=null",)  # random weights


class LiveBytes(TorchDispatchMode):
    """Within the context, the bytes of all storages that operations made and that are still alive: `now` and `peak`.

    What was there before does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), new=False)
        made = operation(*args, **(kwargs or {}))
        self._note(made, new=True)
        return made

    def _note(self, values: Any, *, new: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[key] = storage.nbytes() if new else 0
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within the context all attention is a GPU's fused kernel, which keeps no matrix of scores."""
    before = operations.attend
    for module in (attention, operations):
        module.attend = lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    try:
        yield
    finally:
        for module in (attention, operations):
            module.attend = before


def full_size(how: Recompute, *, frames: int, config: UNetConfig | None = None) -> dict[str, float]:
    """Bytes of one clip of 256x256: kept for the backward pass; the peak of both passes with all gradients; and that
    with each gradient freed as soon as it is there. Weights do not count."""
    with torch.device("meta"):
        unet = UNet3D(config or load(ROOT / "configs" / "a100.yaml").model).to(torch.bfloat16).train()
        inputs = torch.empty(1, 4, frames, 32, 32), torch.empty(1), torch.empty(1, 77, unet.config.context_dim)
    checkpoint_activations(unet, how=how)
    found = {}
    for name in ("peak", "peak_gradients_freed"):
        with fused_attention(), LiveBytes() as live:
            output = unet(*inputs)
            found["kept"] = live.now
            output.square().mean().backward()
            del output
        found[name] = live.peak
        unet.zero_grad()
        for p in unet.parameters():
            p.register_post_accumulate_grad_hook(_free)
    return found


def _free(p: Tensor) -> None:
    p.grad = None


def small(how: Recompute, device: torch.device) -> tuple[UNet3D, Callable[[], None]]:
    """The smaller UNet, without dropout that differs from round to round, and what runs it there and back."""
    torch.manual_seed(0)
    unet = UNet3D(SMALL).to(device).train()
    with torch.no_grad():
        for p in unet.parameters():  # gradients do not pass layers that start at zero
            p += 0.01 * torch.randn(p.shape).to(device)
    checkpoint_activations(unet, how=how)
    latents, context = torch.randn(SHAPE).to(device), torch.randn(SHAPE[0], 77, SMALL.context_dim).to(device)
    times = torch.full(SHAPE[:1], 500, device=device)

    def there_and_back() -> None:
        torch.manual_seed(1)
        unet.zero_grad()
        unet(latents, times, context).square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return unet, there_and_back


def allocator_peak(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes that `work` had allocated at a time, beyond what was there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def on_device(device: torch.device) -> dict[str, dict[str, float]]:
    """The smaller UNet in every mode; rounds alternate, so that what else the machine does strikes all alike."""
    networks = {how: small(how, device) for how in MODES}
    seconds: dict[str, list[float]] = {how: [] for how in MODES}
    found: dict[str, dict[str, float]] = {}
    for how, (unet, work) in networks.items():
        work()
        unet.zero_grad()
        found[how] = {"peak": allocator_peak(work, device)}
    for _ in range(ROUNDS):
        for how, (_, work) in networks.items():
            began = time.perf_counter()
            work()
            seconds[how].append(time.perf_counter() - began)
    plain = [p.grad for p in networks["none"][0].parameters()]
    for how, (unet, _) in networks.items():
        pairs = [(p.grad, q) for p, q in zip(unet.parameters(), plain, strict=True) if p.grad is not None]
        errors = [float((p - q).abs().max() / q.abs().max().clamp(min=1e-12)) for p, q in pairs if q is not None]
        found[how] |= {"seconds": statistics.median(seconds[how]), "gradient_error": max(errors)}
    return found


def sampling(*, frames: int, size: int, at_once: bool = True) -> dict[str, float]:
    """Bytes at the peaks of a guided step and of decoding a clip, with all weights, half of them but the text's.

    What happens inside a kernel, and the CUDA context, about a gigabyte together, do not count.
    """
    overrides = (*UNBOUND, f"sampling.guidance_at_once={str(at_once).lower()}")
    config = load(ROOT / "configs" / "modelscope-1.7b.yaml", overrides)
    with imagined(cuda=True) as ledger, torch.no_grad():
        pipe = TextToVideo(config, build_components(config)).to(dtype=torch.float16)
        parts = (pipe.unet, pipe.vae, pipe.text_encoder)
        found = {"weights": float(sum(p.nbytes for part in parts for p in (*part.parameters(), *part.buffers())))}
        ledger.watch()
        side = {"num_frames": frames, "height": size, "width": size}
        latents = pipe("a prompt", num_inference_steps=1, output_type="latent", **side).frames
        found["denoising"] = float(sum(ledger.peak.values()))
        ledger.watch()
        pipe.vae.decode(latents, tile=config.sampling.vae_tile)
        found["decoding"] = float(sum(ledger.peak.values()))
    return found


def sampling_rows() -> list[dict[str, Any]]:
    cases = [(frames, size, True) for frames, size in SAMPLED] + [(*SAMPLED[1], False)]
    return [
        {"frames": frames, "size": size, "guidance_at_once": at_once}
        | sampling(frames=frames, size=size, at_once=at_once)
        for frames, size, at_once in cases
    ]


def sampling_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| clip | guidance | weights | denoising | decoding |"
    yield "|---|---|---|---|---|"
    for row in rows:
        numbers = " | ".join(f"{row[name] / 1e9:.2f} GB" for name in ("weights", "denoising", "decoding"))
        how = "at once" if row["guidance_at_once"] else "in two calls"
        yield f"| {row['frames']} frames of {row['size']}x{row['size']} | {how} | {numbers} |"


def table(full: dict[str, dict[str, dict[str, float]]], measured: dict[str, dict[str, float]]) -> Iterator[str]:
    columns = ("gradient_checkpointing", "kept, 16 frames", "kept, 24 frames", "peak, 24 frames, gradients freed")
    columns += ("smaller UNet: peak", "time", "largest error of a gradient")
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for how in MODES:
        kept, freed = full[how]["16"]["kept"], full[how]["24"]["peak_gradients_freed"]
        here, base = measured[how], measured["none"]
        yield (
            f"| {how} | {kept / 1e9:.2f} GB | {full[how]['24']['kept'] / 1e9:.2f} GB | {freed / 1e9:.2f} GB "
            f"| {here['peak'] / 1e6:.0f} MB ({here['peak'] / base['peak'] - 1:+.0%}) "
            f"| {here['seconds'] / base['seconds']:.2f} | {here['gradient_error']:.1e} |"
        )


def command(arguments: Sequence[str]) -> None:
    parser = Parser(prog="memory.py", description=str(__doc__).split("\n")[0])
    parser.flag("--device", default="cpu", help="where the smaller UNet runs")
    parser.flag("--sampling", action="store_true", help="what sampling holds, in place of training")
    parser.flag("--json", type=Path, metavar="FILE", help="save the table")
    options = parser.parse_args(arguments)
    if options.sampling:
        rows = sampling_rows()
        print("\n".join(sampling_table(rows)))
        if options.json:
            write_json(options.json, {**environment(torch.device("cpu")), "rows": rows})
        return
    device = pick_device(options.device)
    full = {how: {str(frames): full_size(how, frames=frames) for frames in (16, 24)} for how in MODES}
    measured = on_device(device)
    for line in table(full, measured):
        print(line)
    if options.json:
        record = {"full_size": full, "small": measured, "small_shape": SHAPE}
        write_json(options.json, {**environment(device), **record})


if __name__ == "__main__":
    raise SystemExit(run(command))
