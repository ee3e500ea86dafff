"""A config file is a spelling of dataclasses: what it accepts, what it refuses in one sentence, and the way back."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdm.config import Config, _construct, load, to_yaml
from vdm.data.settings import DataConfig
from vdm.diffusion import DiffusionConfig, SamplingConfig
from vdm.errors import UserError
from vdm.models import UNetConfig, VAEConfig
from vdm.spelling import convert, parse, unparse
from vdm.text.encoder import TextConfig
from vdm.training.settings import TrainingConfig

REFERENCE = Path(__file__).parent / "fixtures" / "reference_flat.yaml"


@pytest.fixture
def load_text(tmp_path: Path) -> Callable[..., Config]:
    """load_text(yaml, *overrides): the config of a file run.yaml with that text."""

    def load_text(text: str, *overrides: str) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load(path, overrides)

    return load_text


# ---- what is accepted


def test_the_reference_file_loads_as_it_stands() -> None:
    config = load(REFERENCE)
    assert config.name == "reference_flat"
    assert config.run_dir == "runs/reference_flat"
    assert (config.model.unet_dim, config.model.attention_heads, config.model.temporal_layers) == (320, 8, 4)
    training = config.training
    assert (training.learning_rate, training.epsilon, training.warmup_steps) == (1e-4, 1e-8, 1000)
    assert (training.batch_size, training.gradient_accumulation_steps, training.effective_batch_size) == (4, 4, 16)
    assert (training.mixed_precision, training.gradient_checkpointing) == ("fp16", "block")
    assert config.diffusion == DiffusionConfig(beta_start=1e-4, beta_end=0.02)
    assert (config.data.dataloader_num_workers, config.data.pin_memory) == (8, True)


def test_the_reference_names_are_unique_to_one_section() -> None:
    bare = set(parse(REFERENCE.read_text(encoding="utf-8"), source="it"))  # type: ignore[call-overload]
    owners = (UNetConfig, VAEConfig, TextConfig, DiffusionConfig, DataConfig, TrainingConfig, SamplingConfig)
    for name in bare:
        assert sum(name in {f.name for f in fields(owner)} for owner in owners) == 1, name


def test_sections_bare_keys_and_overrides_say_the_same(load_text: Callable[..., Config]) -> None:
    in_section = load_text("training:\n  batch_size: 3\n  learning_rate: 1e-3\n")
    assert in_section == load_text("batch_size: 3\nlearning_rate: 0.001\n")
    assert in_section == load_text("seed: 0\n", "training.batch_size=3", "learning_rate=1e-3")
    assert in_section == load_text("training.batch_size: 3\ntraining:\n  learning_rate: 1.0e-3\n")
    assert in_section == load_text("training: {batch_size: 9, learning_rate: 1}", "batch_size=3", "learning_rate=.001")
    assert in_section == load_text("batch_size: 9", "training={batch_size: 3}", "training.learning_rate=1e-3")
    assert in_section == load_text("seed: 0", "batch_size=5", "batch_size=3", "learning_rate=1e-3")


def test_defaults_are_the_dataclasses(load_text: Callable[..., Config]) -> None:
    config = load_text("seed: 3\ntraining:\n")
    assert config == Config(name="run", seed=3)
    assert config.run_dir == "runs/run"
    assert load_text("name: other").run_dir == "runs/other"
    assert load_text("name: other\nrun_dir: /tmp/there").run_dir == "/tmp/there"
    assert load_text("seed: 1", "run_dir=out/x").run_dir == "out/x"


def test_values_are_read_by_the_type_of_their_field(load_text: Callable[..., Config]) -> None:
    text = """
        name: 2024
        seed: 1e3
        mixed_precision: no
        pin_memory: yes
        gradient_checkpointing: false
        max_grad_norm: 2
        keep_checkpoints: null
        num_gpus: ~
        max_num_frames: 16
        negative_prompt:
        root: "null"
        vae_channels: [32, 64]
        vae_norm_num_groups: 8
        channel_mult: [1, 2]
        attention_levels: [no, true]
        preview_prompts: [12, "a: b", on]
    """
    config = load_text(text)
    assert (config.name, config.seed) == ("2024", 1000)
    training, data = config.training, config.data
    assert (training.mixed_precision, training.gradient_checkpointing) == ("no", "none")
    assert training.max_grad_norm == 2.0 and isinstance(training.max_grad_norm, float)
    assert (training.keep_checkpoints, training.num_gpus) == (None, None)
    assert training.preview_prompts == ("12", "a: b", "on")
    assert (data.pin_memory, data.root) == (True, "null")
    assert config.model.attention_levels == (False, True)
    assert (config.model.max_num_frames, config.vae.vae_channels) == (16, (32, 64))
    assert config.sampling.negative_prompt == ""


def test_files_are_utf8(tmp_path: Path) -> None:
    path = tmp_path / "ete.yaml"
    path.write_bytes(b"\xef\xbb\xbfnegative_prompt: \xc3\xa9t\xc3\xa9\n")
    assert load(path).sampling.negative_prompt == "\u00e9t\u00e9"


# ---- what is refused

REFUSED = [
    ("training: {learning_rat: 1}", "unknown key training.learning_rat; did you mean learning_rate?"),
    ("learning_rat: 1", "unknown key learning_rat; did you mean learning_rate?"),
    ("model: {learning_rate: 1}", "unknown key model.learning_rate; did you mean training.learning_rate?"),
    ("sed: 1", "unknown key sed; did you mean seed?"),
    ("trainng: {batch_size: 1}", "unknown key trainng; did you mean training?"),
    ("trainng.batch_size: 1", "unknown section trainng; did you mean training?"),
    ("zzz.batch_size: 1", "unknown section zzz; there is model, vae, text, diffusion, data, training, sampling"),
    ("zzz: 1", "unknown key zzz; there is model, vae, text, diffusion, data, training, sampling"),
    ("training: {zzz: 1}", "unknown key training.zzz; there is task, batch_size, "),
    ("height: 64", "height is a key of 2 sections; write data.height or sampling.height"),
    ("batch_size: 1\ntraining: {batch_size: 1}", "training.batch_size is given twice, in its section and on its own"),
    ("seed: 1\nbatch_size: 1\nseed: 2", "config .*run.yaml is not valid YAML: seed is given twice in line 3"),
    ("training: 4", "training is a section and must hold keys of its own, got '4'"),
    ("training: [a]", "training is a section and must hold keys of its own, got ['a']"),
    ("batch_size: four", "training.batch_size must be a whole number, got 'four'"),
    ("batch_size: 1e-4", "training.batch_size must be a whole number, got '1e-4'"),
    ("batch_size: 2.5", "training.batch_size must be a whole number, got '2.5'"),
    ("batch_size: .inf", "training.batch_size must be a whole number, got '.inf'"),
    ("batch_size: 1e999", "training.batch_size must be a whole number, got '1e999'"),
    ("batch_size: true", "training.batch_size must be a whole number, got 'true'"),
    ("batch_size:", "training.batch_size must be a whole number, got null"),
    ("batch_size: [4]", "training.batch_size must be a whole number, got ['4']"),
    ("keep_checkpoints: some", "training.keep_checkpoints must be a whole number or null, got 'some'"),
    ("learning_rate: fast", "training.learning_rate must be a number, got 'fast'"),
    ("learning_rate: nan", "training.learning_rate must be a number, got 'nan'"),
    ("pin_memory: 1", "data.pin_memory must be true or false, got '1'"),
    ("mixed_precision: fp8", "training.mixed_precision must be one of no, fp16, bf16, got 'fp8'"),
    ("mixed_precision: [no]", "training.mixed_precision must be one of no, fp16, bf16, got ['no']"),
    ("optimizer: sgd", "training.optimizer must be one of adamw, muon, got 'sgd'"),
    ("negative_prompt: {a: b}", "sampling.negative_prompt must be text, got {'a': 'b'}"),
    ("vae_channels: 32", "vae.vae_channels must be a list, each item a whole number, got '32'"),
    ("vae_channels: [32, x]", "vae.vae_channels must be a list, each item a whole number, got ['32', 'x']"),
    ("batch_size: 0", "training.batch_size must be at least 1, got 0"),
    ("adam_beta1: 1", "training.adam_beta1 must be at least 0 and below 1, got 1.0"),
    ("learning_rate: 0", "training.learning_rate must be above 0, got 0.0"),
    ("caption_dropout: 1.1", "training.caption_dropout must be at least 0 and at most 1, got 1.1"),
    ("seed: -1", "seed must be at least 0, got -1"),
    (f"seed: {2**63}", "seed must be below "),
    ("name: ..", "name must be usable as the name of a folder, got '..'"),
    ("name: a/b", "name must be usable as the name of a folder, got 'a/b'"),
    ("name:", "name must be usable as the name of a folder, got ''"),
    ("data: {height: 250}", "data.height=250 is not divisible by 8, the VAE's factor; use 248"),
    ("sampling: {width: 4}", "sampling.width=4 is not divisible by 8, the VAE's factor; use 8"),
    ("in_channels: 8", "model.in_channels=8 must equal vae.latent_channels=4"),
    ("context_dim: 256", "model.context_dim=256 must equal text.text_width=1024"),
    ("max_num_frames: 8\nmin_frames: 8\nmax_frames: 8", "sampling.num_frames=16 is more than model.max_num_frames=8"),
    ("max_num_frames: 20\nmax_frames: 24", "data.max_frames=24 is more than model.max_num_frames=20; lower it"),
    ("effective_batch_size: 15", "training.effective_batch_size is 15, but batch_size 4 x .* x num_gpus 1 is 4"),
    ("num_gpus: 2\neffective_batch_size: 4", "training.effective_batch_size is 4, but .* x num_gpus 2 is 8"),
    ("", "config .*run.yaml must consist of lines such as `seed: 0`, got nothing"),
    ("- a\n- b", "config .*run.yaml must consist of lines such as `seed: 0`, got ['a', 'b']"),
    ("batch_size: [4", "config .*run.yaml is not valid YAML: .* in line 1"),
    ("a: b: c", "config .*run.yaml is not valid YAML: mapping values are not allowed here in line 1"),
    ("? [a]\n: b", "config .*run.yaml is not valid YAML: a key is not text in line 1"),
    ("a: \x07", "config .*run.yaml is not valid YAML: unacceptable character"),
    ("a: !!python/object:os.system x", "config .*run.yaml is not valid YAML: could not determine a constructor"),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSED)
def test_each_mistake_has_its_sentence(load_text: Callable[..., Config], text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_text(text)
    assert re.match(re.escape(sentence).replace(r"\.\*", ".*"), str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.batch_size", "override 'training.batch_size' must be written as section.key=value"),
        ("training.batch_sise=3", "unknown key training.batch_sise; did you mean batch_size?"),
        ("batch_size=x", "training.batch_size must be a whole number, got 'x'"),
        ("preview_prompts=[a", "the value of preview_prompts is not valid YAML: "),
        ("=3", "unknown key ; there is "),
    ],
)
def test_bad_overrides(load_text: Callable[..., Config], override: str, sentence: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(sentence)):
        load_text("seed: 1", override)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config .*nowhere.yaml does not exist$"):
        load(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="is a folder; name a YAML file in it"):
        load(tmp_path)
    (tmp_path / "latin1.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(UserError, match="latin1.yaml is not UTF-8 text"):
        load(tmp_path / "latin1.yaml")
    with pytest.raises(UserError, match="cannot be read: Not a directory"):
        load(tmp_path / "latin1.yaml" / "x.yaml")


def test_a_key_without_default_must_be_there() -> None:
    @dataclass(frozen=True)
    class Owner:
        size: int

    with pytest.raises(UserError, match="missing key model.size, which has no default"):
        _construct(Owner, "model", {}, {})


def test_the_effective_batch_size_may_be_right(load_text: Callable[..., Config]) -> None:
    text = "batch_size: 2\ngradient_accumulation_steps: 3\nnum_gpus: 4\neffective_batch_size: 24"
    assert load_text(text).training.effective_batch_size == 24


def test_a_vae_run_needs_no_matching_unet(load_text: Callable[..., Config]) -> None:
    assert load_text("latent_channels: 8", "task=vae").vae.latent_channels == 8


# ---- there and back

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
AWKWARD = ["no", "null", "~", "", "1e-4", "1:30", "a: b", "#x", "- y", "{", " x ", "\n", "\x85", "\ufeff", "2024-01-01"]
WORDS = TEXT | st.sampled_from(AWKWARD)
NUMBER = st.floats(min_value=1e-12, max_value=1e12)
SHARE = st.floats(min_value=0, max_value=1)
COUNT = st.integers(min_value=1, max_value=10**12)

TRAINING = st.builds(
    TrainingConfig,
    task=st.sampled_from(["unet", "vae", "text"]),
    batch_size=COUNT,
    learning_rate=NUMBER,
    epsilon=NUMBER,
    caption_dropout=SHARE,
    mixed_precision=st.sampled_from(["no", "fp16", "bf16"]),
    gradient_checkpointing=st.sampled_from(["none", "cheap", "block"]),
    keep_checkpoints=st.none() | COUNT,
    preview_prompts=st.lists(WORDS, max_size=3).map(tuple),
    init_from=st.none() | WORDS,
)
SAMPLING = st.builds(
    SamplingConfig,
    height=st.integers(1, 9).map(lambda n: 8 * n),
    num_frames=st.integers(1, 99),
    guidance_scale=NUMBER,
    negative_prompt=WORDS,
)
CONFIGS = st.builds(
    Config,
    name=WORDS.filter(lambda name: name not in ("", ".", "..") and "/" not in name),
    seed=st.integers(0, 2**63 - 1),
    run_dir=WORDS,
    data=st.builds(DataConfig, root=st.none() | WORDS, pin_memory=st.booleans(), width=st.just(64), fps=NUMBER),
    vae=st.builds(VAEConfig, scaling_factor=NUMBER, vae_weights=st.none() | WORDS),
    training=TRAINING,
    sampling=SAMPLING,
)


@given(config=CONFIGS)
def test_the_resolved_config_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.getbasetemp() / "other-name.yaml"
    path.write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load(path) == config


def test_every_section_and_key_is_spelled_out() -> None:
    tree = parse(to_yaml(Config(name="x")), source="it")
    assert isinstance(tree, dict)
    assert list(tree) == [f.name for f in fields(Config)]
    assert list(tree["training"]) == [f.name for f in fields(TrainingConfig)]
    assert "channel_mult: [1, 2, 4, 4]" in to_yaml(Config(name="x"))


VALUES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, st.integers()),
    (float, st.floats(allow_nan=False, allow_infinity=False)),
    (bool, st.booleans()),
    (str, WORDS),
    (str | None, st.none() | WORDS),
    (int | float, st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)),
    (float | None, st.none() | NUMBER),
    (Literal["no", "null", "1"], st.sampled_from(["no", "null", "1"])),
    (tuple[int, ...], st.lists(st.integers()).map(tuple)),
    (tuple[bool, ...], st.lists(st.booleans()).map(tuple)),
    (tuple[str, ...], st.lists(WORDS).map(tuple)),
    (tuple[str, ...] | None, st.none() | st.lists(WORDS).map(tuple)),
]


@pytest.mark.parametrize(("annotation", "values"), VALUES)
@given(data=st.data())
def test_every_type_of_value_is_read_back(annotation: Any, values: st.SearchStrategy[Any], data: st.DataObject) -> None:
    value = data.draw(values)
    tree = parse(unparse({"key": value}), source="it")
    assert isinstance(tree, dict)
    assert convert(tree["key"], annotation, key="key") == value


@given(text=st.text(string.printable, max_size=60))
def test_any_text_is_a_config_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_configs_cannot_be_changed() -> None:
    config = Config(name="x")
    with pytest.raises(AttributeError):
        config.seed = 1  # type: ignore[misc]
    assert replace(config, seed=1).seed == 1
