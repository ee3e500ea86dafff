"""The parts of a model: built from a config, filled from a model folder of any layout, written to one of ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vdm.checkpoint import save_checkpoint
from vdm.config import Config, to_yaml
from vdm.diffusion import NoiseSchedule
from vdm.errors import UserError
from vdm.interop import StoredModel, open_model
from vdm.models import UNet3D, VideoVAE
from vdm.text.encoder import TextEncoder, pack_vocabulary
from vdm.text.pretrained import load_open_clip
from vdm.training.groups import is_temporal
from vdm.weights import Weights, fill

SHIPPED = Path(__file__).parent / "assets" / "demo"
SECTIONS = {"unet": "model", "vae": "vae", "text": "text"}  # of a config, by part
# What the shapes of weights do not tell, and the weights are no good without.
UNSEEN = ("attention_head_dim", "norm_num_groups", "vae_norm_num_groups", "text_heads", "pad_token_id")
NOISE = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "zero_terminal_snr",
    "noise_shift",
    "trained_betas",
)


@dataclass(frozen=True)
class Components:
    """The parts of a model, on one device."""

    unet: UNet3D
    vae: VideoVAE
    text_encoder: TextEncoder
    schedule: NoiseSchedule

    def modules(self) -> dict[str, nn.Module]:
        """Parts with weights, under their names in a checkpoint."""
        return {"unet": self.unet, "vae": self.vae, "text": self.text_encoder}


def without_sources(config: Config) -> Config:
    """The config for a model whose weights all come from one checkpoint: what they were first made from is history."""
    return replace(config, vae=replace(config.vae, vae_weights=None), text=replace(config.text, text_weights=None))


def with_sources(config: Config, path: Path) -> Config:
    """The config for a model whose frozen parts come from the checkpoint `path`."""
    vae, text = replace(config.vae, vae_weights=str(path)), replace(config.text, text_weights=str(path))
    return replace(config, vae=vae, text=text)


def build_components(config: Config) -> Components:
    """Build all parts of `config`, on the CPU: random weights from `config.seed`, then those that `config` names.

    Raises `UserError` where named weights are missing or of another shape.
    """
    unet, vae, text_encoder = build_unet(config), build_vae(config), build_text_encoder(config)
    return Components(unet, vae, text_encoder, NoiseSchedule(config.diffusion))


def build_unet(config: Config) -> UNet3D:
    """The UNet alone: random weights from `config.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return UNet3D(config.model)


def build_text_encoder(config: Config) -> TextEncoder:
    """The text encoder alone: random weights from `config.seed`, then those that `config` names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)  # else its first numbers were those of the UNet
        text_encoder = TextEncoder(config.text)
    _start_text(text_encoder)
    return text_encoder


def _start_text(text_encoder: TextEncoder) -> None:
    """Fill a text encoder with the weights that its own config names: a model folder's, or open_clip's."""
    weights = text_encoder.config.text_weights
    if weights == "shipped" or (weights is not None and Path(weights).is_dir()):
        _load_trained(text_encoder, _folder(weights), "text", free=("text_weights", "text_trainable"))
    elif weights is not None:
        load_open_clip(text_encoder, weights)


def _folder(name: str) -> Path:
    return SHIPPED if name == "shipped" else Path(name)


def build_vae(config: Config) -> VideoVAE:
    """The autoencoder alone, made as `build_components` makes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vae = VideoVAE(config.vae)
    if config.vae.vae_weights is not None:
        # The scaling factor is no property of the weights, but of how diffusion is to see their latents.
        free = ("vae_weights", "scaling_factor", "temporal_decoder")
        _load_trained(vae, _folder(config.vae.vae_weights), "vae", free=free)
    return vae


def _load_trained(module: VideoVAE | TextEncoder, path: Path, part: str, *, free: Collection[str]) -> None:
    """Fill a part from a model folder, whose config of that part must agree in all but the keys `free`."""
    stored = open_model(path)
    _require_same(module, stored, part, keys=asdict(module.config).keys() - set(free))
    fill_part(module, stored, part)


def load_part(module: nn.Module, path: Path, part: str) -> None:
    """Fill a part from a model folder of any layout, with its averaged weights where there are any.

    What an image model cannot have stays as it is: temporal layers. Raises `UserError`, also where the weights fit and
    would be of another network.
    """
    stored = open_model(path)
    stored.open(part)  # what is not there at all is said first
    _require_same(module, stored, part, keys=UNSEEN)
    fill_part(module, stored, part)


def _require_same(module: nn.Module, stored: StoredModel, part: str, *, keys: Collection[str]) -> None:
    theirs = asdict(getattr(stored.config, SECTIONS[part]))
    for key, ours in asdict(module.config).items():  # type: ignore[call-overload]
        if key in keys and ours != theirs[key]:
            wanted = f"{stored.path} was trained with {theirs[key]!r}"
            raise UserError(f"{SECTIONS[part]}.{key} is {ours!r}, but {wanted}; use that")


def other_noise(config: Config, stored: StoredModel) -> dict[str, tuple[object, object]]:
    """The keys of `diffusion` in which a run has its network see or say something else than the stored one does, with
    the run's value and the model's."""
    ours, theirs = asdict(config.diffusion), asdict(stored.config.diffusion)
    table, their_table = (NoiseSchedule(one).alphas_cumprod for one in (config.diffusion, stored.config.diffusion))
    same = table.shape == their_table.shape and torch.allclose(table, their_table, rtol=1e-4)
    keys = ("prediction_type", *(() if same else NOISE))
    return {f"diffusion.{key}": (ours[key], theirs[key]) for key in keys if ours[key] != theirs[key]}


def fill_part(module: nn.Module, stored: StoredModel, part: str) -> None:
    held = stored.open(part)
    fresh = held.report.fresh if held.report is not None else ()
    added = [name for name in module.state_dict() if name.startswith("decoder.time.")]  # they start at zero
    if part == "unet" and stored.config.model.model_type == "spatial":  # an image model of ours
        added += filter(is_temporal, module.state_dict())
    fill(module, held.weights, source=f"the {part} weights in {stored.path}", keep=(*fresh, *added))


def save_parts(
    path: str | Path,
    config: Config,
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    info: Mapping[str, object] | None = None,
) -> None:
    """Write a checkpoint folder of state dicts, without trainer state; of a text tower trained here, only the tokens it
    saw."""
    weights = {part: Weights.of(state) for part, state in parts.items()}
    if "text" in weights:
        weights["text"] = pack_vocabulary(weights["text"])
    weights = {part: state.cast(dtype) for part, state in weights.items()}
    save_checkpoint(path, config_yaml=to_yaml(config), weights=weights, info=dict(info or {}))


def states(modules: Mapping[str, nn.Module]) -> dict[str, Mapping[str, Tensor]]:
    """The state dict of each part."""
    return {part: module.state_dict() for part, module in modules.items()}
