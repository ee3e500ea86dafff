"""Where a run goes on from, and what its config may have changed since."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from vdm import checkpoint, dist
from vdm.components import with_sources, without_sources
from vdm.config import Config, load
from vdm.errors import UserError

# What the weights and moments of a checkpoint are made for, by the part that has to be in it.
FIXED = {
    "": ("training.task", "training.optimizer", "training.optimizer_states", "training.weights_dtype",
         "training.lora_", "diffusion.prediction_type", "diffusion.num_train_timesteps", "diffusion.beta",
         "diffusion.zero", "diffusion.noise_shift", "diffusion.trained_betas"),
    "unet": ("model.",), "vae": ("vae.",), "text": ("text.",),
}  # fmt: skip
FREE = (
    "model.dropout", "model.temporal_dropout", "model.max_num_frames", "model.attention_kernel", "vae.vae_weights",
    "text.text_weights", "training.optimizer_in_backward",
)  # fmt: skip
# What is either no setting of the run, or says how to start one.
NO_MATTER = ("name", "run_dir", "training.init_from", "vae.vae_weights", "text.text_weights", "training.num_gpus")
# What the stream of clips and the draws depend on.
STREAM = ("seed", "data.", "training.batch_size", "training.gradient_accumulation_steps")
HOW_READ = ("data.dataloader_num_workers", "data.pin_memory", "data.decode_timeout", "data.max_bad_share",
            "data.cache_latents", "data.cache_dir", "data.validation_clips")  # fmt: skip


def starting_point(run_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from, if any; `resume` is "latest", a checkpoint, or None for a run that is new.

    Processes that torchrun has started anew resume in any case. Raises UserError.
    """
    if dist.restarts() > 0 and (resume is None or checkpoint.list_checkpoints(run_dir)):
        resume = "latest"
    if resume is None:
        if checkpoint.list_checkpoints(run_dir) or (run_dir / "final").exists():
            raise UserError(
                f"{run_dir} already holds checkpoints; go on with --resume latest, or choose another run_dir"
            )
        return None
    if resume != "latest":
        step = int(checkpoint.verify(resume).info.get("step", 0))
        later = [path.name for path in checkpoint.list_checkpoints(run_dir) if checkpoint.step_of(path) > step]
        if later:  # of another branch, which "latest" and the rule of what stays could not tell from this one
            raise UserError(
                f"{run_dir} holds later checkpoints than {resume} ({', '.join(later)}); go on from that in another "
                "run_dir, or move them away"
            )
        return Path(resume)
    newest = checkpoint.latest(run_dir)
    if newest is None and any(checkpoint.seems_complete(path) for path in checkpoint.list_checkpoints(run_dir)):
        raise UserError(
            f"none of the checkpoints in {run_dir} can be read; mend them, or move them away to start afresh"
        )
    print(f"resuming from {newest}" if newest else f"no checkpoint in {run_dir} yet: starting afresh")
    return newest


def as_resumed(config: Config, start: Path) -> Config:
    """The config to build a resumed task from: what its parts were first made from is history."""
    if config.training.lora_rank is not None:
        return config  # of which a checkpoint holds no more than the change
    return with_sources(config, start) if config.data.cache_dir is not None else without_sources(config)


def require_same_run(config: Config, start: Path) -> None:
    """Compare a config with that of the checkpoint that it is to go on from, and say what differs.

    Raises UserError where it differs in what may not change.
    """
    try:
        theirs = load(start / checkpoint.CONFIG)
    except UserError as error:
        raise UserError(f"{start} was made by another version of vdm, for its {error}; start a new run") from None
    changed = changes(theirs, config)
    parts = checkpoint.read_manifest(start).parts
    fixed = tuple(key for part, keys in FIXED.items() if part in ("", *parts) for key in keys)
    wrong = {key: said for key, said in changed.items() if key.startswith(fixed) and key not in FREE}
    allowed = {key: said for key, said in changed.items() if key not in wrong}
    may = "" if not allowed else f"; {_listed(allowed)} may differ"
    whole = "training.init_from=" + str(start) if theirs.training.lora_rank is None else "its model"
    if wrong:
        raise UserError(
            f"{start} was made with other settings that a resumed run may not change: {_listed(wrong)}{may}; "
            f"set those back, or start a new run from {whole}"
        )
    if allowed and dist.is_main():
        other = (
            " (other clips or draws from here on)"
            if any(key.startswith(STREAM) and key not in HOW_READ for key in allowed)
            else ""
        )
        print(f"note: {start.name} was made with other settings, which may differ: {_listed(allowed)}{other}")
        sys.stdout.flush()


def changes(before: Config, after: Config) -> dict[str, str]:
    """What differs between two configs: dotted key to "old -> new"."""
    old, new = _flat(asdict(before)), _flat(asdict(after))
    return {
        key: f"{_shown(old[key])} -> {_shown(value)}"
        for key, value in new.items()
        if key not in NO_MATTER and value != old[key]
    }


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _listed(changed: Mapping[str, str]) -> str:
    return ", ".join(f"{key} ({said})" for key, said in changed.items())
