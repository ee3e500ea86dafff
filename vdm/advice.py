"""What is amiss with a run that has not begun, and which options would make it fit into a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vdm.config import Config
from vdm.data.shards import expand
from vdm.errors import UserError
from vdm.files import at_home
from vdm.footprint import footprint
from vdm.plan import Disk, Plan, disk_of, fits, steps_of, work_of
from vdm.training.kinds import random_parts

Change = tuple[str, Callable[[Config], Config | None]]  # its spelling, and what it makes of a config it applies to


def make_plan(config: Config, *, names: tuple[str, ...], mfu: float, advise: bool) -> Plan:
    """The plan of a run. `advise` looks for options that make it fit into those of the GPUs into which it does not;
    each that is tried takes as long as the plan itself."""
    measured = footprint(config)
    disk = disk_of(config, measured)
    plan = Plan(config, measured, work_of(config, measured), disk, mfu, {}, tuple(warnings_of(config, disk)))
    lacking = [name for name in names if not plan.fits(name)] if advise else []
    return replace(plan, advice={name: to_fit(config, name) for name in lacking})


def _training(**values: Any) -> Callable[[Config], Config | None]:
    def change(config: Config) -> Config | None:
        training = replace(config.training, **values)
        return None if training == config.training else replace(config, training=training)

    return change


def _recompute_norms(config: Config) -> Config | None:
    return (
        _training(gradient_checkpointing="cheap")(config) if config.training.gradient_checkpointing == "none" else None
    )


def _encode_once(config: Config) -> Config | None:
    data = config.data
    if config.training.task == "vae" or data.cache_dir is not None or data.cache_latents:
        return None
    return replace(config, data=replace(data, cache_dir=f"cache/{config.name}"))


def _round_weights(config: Config) -> Config | None:
    if config.training.optimizer != "adamw":
        return None
    return _training(weights_dtype="bf16", mixed_precision="bf16")(config)


def _update_at_once(config: Config) -> Config | None:
    """There must be nothing to add up or to exchange first."""
    training = config.training
    alone = training.gradient_accumulation_steps == 1 and (training.num_gpus or 1) == 1
    possible = training.optimizer == "adamw" and training.mixed_precision != "fp16" and alone
    return _training(optimizer_in_backward=True)(config) if possible else None


def _adamw(change: Callable[[Config], Config | None]) -> Callable[[Config], Config | None]:
    return lambda config: change(config) if config.training.optimizer == "adamw" else None


def _halve(config: Config) -> Config | None:
    training = config.training
    if training.optimizer_in_backward:
        return None  # which has no gradients to add up
    if training.batch_size % 2 or (training.task == "text" and training.batch_size == 2):
        return None
    micro_steps = 2 * training.gradient_accumulation_steps
    return _training(batch_size=training.batch_size // 2, gradient_accumulation_steps=micro_steps)(config)


def _low_rank(config: Config) -> Config | None:
    wanted = config.training.task == "unet" and config.training.lora_rank is None and not config.text.text_trainable
    base = config.training.init_from or "MODEL"  # which is not looked at
    return _training(lora_rank=16, init_from=base)(config) if wanted else None


# In the order of what they cost: nothing, time, a little of the result.
CHANGES: tuple[Change, ...] = (
    ("training.gradient_checkpointing=cheap", _recompute_norms),
    ("training.gradient_checkpointing=block", _training(gradient_checkpointing="block")),
    ("data.cache_dir", _encode_once),
    ("training.ema_offload=true", _training(ema_offload=True)),
    ("training.optimizer_states=8bit", _adamw(_training(optimizer_states="8bit"))),
    ("training.weights_dtype=bf16", _round_weights),
    ("training.optimizer_in_backward=true", _update_at_once),
    ("training.batch_size", _halve),
    ("training.batch_size", _halve),
    ("training.batch_size", _halve),
    ("training.lora_rank=16", _low_rank),
)


def to_fit(config: Config, name: str) -> tuple[str, ...] | None:
    """The changes after which a run fits into a GPU: as many as it takes in the order of CHANGES, less those that it
    then fits without. None where all of them are not enough."""
    made: list[Callable[[Config], Config | None]] = []
    for spelling, change in CHANGES:
        now = _after(config, made)
        assert now is not None, "it was so before"
        changed = _after(config, [*made, change])
        if changed is None or changed == now:
            continue
        print(f"{name}: trying {spelling}", file=sys.stderr)
        made.append(change)
        if _fits(changed, name):
            break
    else:
        return None
    for place in reversed(range(len(made) - 1)):
        fewer = made[:place] + made[place + 1 :]
        without = _after(config, fewer)
        if without is not None and _fits(without, name):
            made = fewer
    return tuple(_differences(config, _after(config, made) or config))


def _after(config: Config, changes: list[Callable[[Config], Config | None]]) -> Config | None:
    """The config after some changes; None where the last does not apply, or is refused."""
    changed: Config | None = config
    for change in changes:
        try:
            changed = change(config)
        except UserError:
            changed = None
        config = changed or config
    return changed if changes else config


def _fits(config: Config, name: str) -> bool:
    try:
        return fits(config, name)
    except UserError:  # a combination that the run would refuse
        return False


def _differences(config: Config, changed: Config) -> Iterator[str]:
    for section in ("data", "training"):
        before, after = vars(getattr(config, section)), vars(getattr(changed, section))
        for key, value in after.items():
            if value != before[key]:
                yield f"{section}.{key}={str(value).lower() if isinstance(value, bool) else value}"


def _is_there(root: str) -> bool:
    """Whether a data root can be read, as far as can be told from here; of a pattern of shards, the first."""
    return "://" in root or at_home(root).exists() or at_home(expand(root)[0]).exists()


def warnings_of(config: Config, disk: Disk) -> Iterator[str]:
    """What would be a pity to learn of later, a sentence each."""
    training, data = config.training, config.data
    steps = steps_of(config)
    for key in random_parts(config):
        yield f"{key} is null, so this run trains on a random, frozen network"
    if data.format != "mini-something":
        if data.root is None:
            yield "data.root is not set"
        elif data.cache_dir is None and not _is_there(data.root):
            yield f"data.root={data.root} is not there"
    if data.cache_dir is not None and not Path(data.cache_dir).is_dir():
        yield f"data.cache_dir={data.cache_dir} is not there yet; vdm data cache makes it"
    if training.warmup_steps >= steps:
        yield f"training.warmup_steps={training.warmup_steps} is the whole run of {steps} steps"
    clips = steps * training.batch_size * training.gradient_accumulation_steps * (training.num_gpus or 1)
    if data.num_clips is not None and clips < data.num_clips:
        yield f"{steps} steps see {clips} clips, fewer than the {data.num_clips} that there are"
    if training.checkpointing_steps > steps:
        yield f"training.checkpointing_steps={training.checkpointing_steps}: nothing is saved before the last step"
    if training.validation_steps == 0:
        yield "training.validation_steps=0: the run is never validated"
    if training.max_train_epochs is not None and data.num_clips is None:
        yield f"training.max_train_epochs={training.max_train_epochs:g} may end the run before {steps} steps"
    if training.init_from is not None and not Path(training.init_from).exists():
        yield f"training.init_from={training.init_from} is not there"
    if training.max_train_hours is not None:
        yield f"training.max_train_hours={training.max_train_hours:g} may end the run before {steps} steps"
    if disk.run > disk.free:
        yield (
            f"the run folder comes to {disk.run / 1e9:.1f} GB and {disk.free / 1e9:.1f} GB are free; "
            "set training.keep_checkpoints, or run_dir to another disk"
        )
