"""A plan in words and columns."""

from __future__ import annotations

from collections.abc import Iterator

from vdm.plan import CONTEXT, GIB, GPUS, Plan, steps_of


def table(plan: Plan, names: tuple[str, ...]) -> str:
    """What `--plan` prints."""
    return "\n".join(
        [*_head(plan), "", *_parameters(plan), "", *_memory(plan), "", *_time(plan, names), "", *_disk(plan)]
        + [f"warning: {sentence}" for sentence in plan.warnings]
    )


def _head(plan: Plan) -> Iterator[str]:
    data, training = plan.config.data, plan.config.training
    frames = f"{data.min_frames}-{data.max_frames}" if data.min_frames < data.max_frames else str(data.max_frames)
    clips = training.batch_size * training.gradient_accumulation_steps * (training.num_gpus or 1)
    yield (
        f"{plan.config.name}: {steps_of(plan.config):,} steps of {clips} clips ({training.num_gpus or 1} x "
        f"{training.batch_size} x {training.gradient_accumulation_steps}), {frames} frames of "
        f"{data.width}x{data.height}, {training.mixed_precision}, recomputed: {training.gradient_checkpointing}"
    )


def _parameters(plan: Plan) -> Iterator[str]:
    yield f"{'parameters':32}{'in all':>16}{'trained':>16}"
    for part, count in plan.footprint.parameters.items():
        yield f"  {part:30}{count:16,}{plan.footprint.trained.get(part, 0):16,}"
    for part in plan.footprint.trained.keys() - plan.footprint.parameters.keys():
        yield f"  {part:30}{'':16}{plan.footprint.trained[part]:16,}"


def _memory(plan: Plan) -> Iterator[str]:
    """Kinds down, phases across, at the peak of each phase."""
    phases = plan.phases
    kinds = dict.fromkeys(kind for held in phases.values() for kind in sorted(held, key=_place))
    yield f"{'memory of a GPU at its peak, GiB':32}" + "".join(f"{phase:>16}" for phase in phases)
    for kind in sorted(kinds, key=_place):
        row = (held.get(kind, 0) / GIB for held in phases.values())
        yield f"  {kind + (' *' if kind == CONTEXT else ''):30}" + "".join(f"{size:16.2f}" for size in row)
    yield f"  {'in all':30}" + "".join(f"{sum(held.values()) / GIB:16.2f}" for held in phases.values())
    yield "  * assumed; all else is what the run's own code holds, with fused attention"


def _place(kind: str) -> tuple[int, str]:
    order = ("weights", "gradients", "optimizer", "averaged", "activations", "CUDA")
    return next((i for i, word in enumerate(order) if kind.startswith(word)), len(order)), kind


def _time(plan: Plan, names: tuple[str, ...]) -> Iterator[str]:
    training, work = plan.config.training, plan.work
    parts = {"forward": work.forward, "backward": work.backward, "computed again": work.again, "frozen": work.frozen}
    told = ", ".join(f"{name} {tflop:.4g}" for name, tflop in parts.items() if tflop)
    yield f"{work.total:.4g} TFLOP a step and process: {told}"
    columns = ("TFLOP/s", "GiB", "fits", "s a step", "hours", "clips/min")
    yield f"{f'at an MFU of {plan.mfu:g}':20}" + "".join(f"{name:>12}" for name in columns)
    processes = training.num_gpus or 1
    for name in names:
        seconds, gpu = plan.seconds(name), GPUS[name]
        clips = training.batch_size * training.gradient_accumulation_steps * processes
        numbers = (f"{gpu.tflops(training.mixed_precision):g}", f"{gpu.gib:g}", "yes" if plan.fits(name) else "no")
        times = (f"{seconds:.3g}", f"{seconds * steps_of(plan.config) / 3600:.3g}", f"{60 * clips / seconds:.4g}")
        label = name if processes == 1 else f"{processes} x {name}"
        yield f"  {label:18}" + "".join(f"{one:>12}" for one in (*numbers, *times))
    if processes > 1:
        hours = ", ".join(
            f"{plan.seconds(name) * steps_of(plan.config) / 3600 * processes:.3g} on {name}" for name in names
        )
        yield f"GPU hours: {hours}"
    for name in names:
        if not plan.fits(name):
            yield f"warning: {plan.peak / GIB:.1f} GiB do not fit into a {name}; {_remedy(plan, name)}"


def _remedy(plan: Plan, name: str) -> str:
    if name not in plan.advice:
        return f"--gpu {name} looks for options with which it does"
    changes = plan.advice[name]
    return "no option makes it fit" if changes is None else f"it fits with {' '.join(changes)}"


def _disk(plan: Plan) -> Iterator[str]:
    disk = plan.disk
    yield "disk, GB"
    for part, size in plan.footprint.checkpoint.items():
        yield f"  {part:30}{size / 1e9:10.3f}"
    yield f"  {'a checkpoint':30}{disk.checkpoint / 1e9:10.3f}   of which {disk.kept} stay, and one more for a moment"
    yield f"  {'the finished model':30}{disk.final / 1e9:10.3f}"
    yield f"  {'the run folder':30}{disk.run / 1e9:10.3f}   {disk.free / 1e9:.1f} are free"
    if disk.cache is not None:
        yield f"  {'latent cache, at most':30}{disk.cache / 1e9:10.3f}"
