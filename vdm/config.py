"""A run's settings: one frozen dataclass of the parts' own dataclasses; a YAML file says where a run differs from them.

A default is written once, in the dataclass of its owner. Which keys there are, and of what type, its annotations say.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from vdm.data.settings import DataConfig
from vdm.diffusion import DiffusionConfig, SamplingConfig
from vdm.errors import UserError, nearest
from vdm.models import UNetConfig, VAEConfig
from vdm.spelling import convert, parse, unparse
from vdm.text.encoder import TextConfig
from vdm.training.settings import TrainingConfig


@dataclass(frozen=True)
class Config:
    """All that decides a run. Raises UserError where two sections contradict each other."""

    name: str
    seed: int = 0
    run_dir: str = ""  # relative to the working directory; empty becomes runs/<name>
    model: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or "/" in self.name:
            raise UserError(f"name must be usable as the name of a folder, got {self.name!r}")
        if self.seed < 0:
            raise UserError(f"seed must be at least 0, got {self.seed}")
        if self.seed >= 2**63:
            raise UserError(f"seed must be below 2**63, got {self.seed}")
        if not self.run_dir:
            object.__setattr__(self, "run_dir", f"runs/{self.name}")
        self._complete_lora()
        self._check_networks()
        self._check_sizes()
        self._check_frames()

    def _complete_lora(self) -> None:
        """A LoRA is used with the model that it is of, and so is trained with all parts of that."""
        base = self.training.init_from
        if self.training.lora_rank is None or base is None:
            return
        if self.text.text_trainable:
            raise UserError(
                "training.lora_rank trains a change of the UNet alone; set text.text_trainable to false, or train the "
                "model itself"
            )
        if self.vae.vae_weights is None:
            object.__setattr__(self, "vae", replace(self.vae, vae_weights=base))
        if self.text.text_weights is None:
            object.__setattr__(self, "text", replace(self.text, text_weights=base))

    def _check_networks(self) -> None:
        if self.training.task != "unet":
            return  # none is built
        channels, width = self.model.in_channels, self.model.context_dim
        if channels != self.vae.latent_channels:
            raise UserError(f"model.in_channels={channels} must equal vae.latent_channels={self.vae.latent_channels}")
        if width != self.text.text_width:
            raise UserError(f"model.context_dim={width} must equal text.text_width={self.text.text_width}")
        for name in ("dropout", "temporal_dropout"):
            if self.training.cuda_graph and getattr(self.model, name):
                raise UserError(
                    f"training.cuda_graph would drop the same numbers at every step; set model.{name}=0, not "
                    f"{getattr(self.model, name)}, or leave it out"
                )

    def _check_sizes(self) -> None:
        factor = self.vae.factor
        sizes = {
            "data.height": self.data.height,
            "data.width": self.data.width,
            "sampling.height": self.sampling.height,
            "sampling.width": self.sampling.width,
        }
        for name, pixels in sizes.items():
            if pixels < factor or pixels % factor:
                use = max(factor, pixels - pixels % factor)
                raise UserError(f"{name}={pixels} is not divisible by {factor}, the VAE's factor; use {use}")

    def _check_frames(self) -> None:
        limit = self.model.max_num_frames
        lengths = {"data.max_frames": self.data.max_frames, "sampling.num_frames": self.sampling.num_frames}
        for name, frames in lengths.items():
            if limit is not None and frames > limit:
                raise UserError(f"{name}={frames} is more than model.max_num_frames={limit}; lower it or raise that")


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, then the overrides `section.key=value` or, where the key's name is unique, `key=value`.

    A key may stand in its section or, where its name is unique, at the top. `name` defaults to the file's stem.
    Raises UserError for a file that cannot be read, a key that is unknown, ambiguous, missing or given twice, and a
    value of the wrong type or out of range.
    """
    path = Path(path)
    return _build({("", "name"): path.stem, **_locate_all(_read(path)), **_overridden(overrides)})


def override(config: Config, overrides: Iterable[str] = ()) -> Config:
    """A config that was not read from YAML, with overrides as `load` takes them; every value is of its type.

    Raises UserError.
    """
    tree = parse(to_yaml(config), source="the config")
    assert isinstance(tree, dict)
    return _build({**_locate_all(tree), **_overridden(overrides)})


def _overridden(overrides: Iterable[str]) -> dict[Place, object]:
    values: dict[Place, object] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"override {text!r} must be written as section.key=value")
        values |= _locate_all({key.strip(): parse(value, source=f"the value of {key}")})
    return values


def _build(values: Mapping[Place, object]) -> Config:
    sections = {name: _construct(owner, name, values, {}) for name, owner in _SECTIONS.items()}
    config: Config = _construct(Config, "", values, sections)
    return config


def to_yaml(config: Config) -> str:
    """The whole config with every default spelled out; `load` reads it back equal."""
    return unparse(asdict(config))


# Which keys there are. A place is (section, key); the top level is the section "".
Place = tuple[str, str]
_SECTIONS: dict[str, Any] = {name: hint for name, hint in typing.get_type_hints(Config).items() if is_dataclass(hint)}
_TYPES: dict[Place, Any] = {
    (section, f.name): typing.get_type_hints(owner)[f.name]
    for section, owner in {"": Config, **_SECTIONS}.items()
    for f in fields(owner)
    if f.name not in _SECTIONS
}


def _dotted(place: Place) -> str:
    return ".".join(place).lstrip(".")


def _locate(key: str) -> Place:
    """Where `section.key`, or a `key` on its own, belongs."""
    section, _, name = key.rpartition(".")
    if section and section not in _SECTIONS:
        raise _unknown(f"section {section}", nearest(section, _SECTIONS), _SECTIONS)
    places = [place for place in _TYPES if place[1] == name and section in ("", place[0])]
    if len(places) > 1:
        spellings = [_dotted(place) for place in places]
        raise UserError(f"{name} is a key of {len(places)} sections; write {' or '.join(spellings)}")
    if places:
        return places[0]
    keys = [place[1] for place in _TYPES if section in ("", place[0])]
    elsewhere = {place[1]: _dotted(place) for place in _TYPES}
    guess = nearest(name, keys) or elsewhere.get(nearest(name, elsewhere), "") or nearest(name, _SECTIONS)
    raise _unknown(f"key {key}", guess, keys if section else _SECTIONS)


def _unknown(what: str, guess: str, valid: Iterable[str]) -> UserError:
    return UserError(f"unknown {what}; " + (f"did you mean {guess}?" if guess else f"there is {', '.join(valid)}"))


def _locate_all(tree: Mapping[str, object]) -> dict[Place, object]:
    """{place: value} of all keys of a file, or of one override."""
    values: dict[Place, object] = {}
    for key, value in _entries(tree):
        place = _locate(key)
        if place in values:
            raise UserError(f"{_dotted(place)} is given twice, in its section and on its own; remove one")
        values[place] = value
    return values


def _entries(tree: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """(dotted or bare key, value) of every line."""
    for key, value in tree.items():
        if key not in _SECTIONS:
            yield key, value
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        elif value is not None:  # null is a section whose every line is commented out
            raise UserError(f"{key} is a section and must hold keys of its own, got {value!r}")


def _construct(owner: type, section: str, values: Mapping[Place, object], parts: Mapping[str, object]) -> Any:
    """One dataclass from its share of the values; `parts` are fields that are there already."""
    given = dict(parts)
    for f in fields(owner):
        place = (section, f.name)
        if place in values:
            given[f.name] = convert(values[place], _TYPES[place], key=_dotted(place))
        elif f.name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"missing key {_dotted(place)}, which has no default")
    return owner(**given)


def _read(path: Path) -> Mapping[str, object]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"config {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"config {path} is a folder; name a YAML file in it") from None
    except UnicodeDecodeError:
        raise UserError(f"config {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from error
    tree = parse(text, source=f"config {path}")
    if not isinstance(tree, dict):
        shown = "nothing" if tree is None else repr(tree)[:80]
        raise UserError(f"config {path} must consist of lines such as `seed: 0`, got {shown}")
    return tree
