"""A LoRA that is trained: dense matrices as its oracle, what a step changes, what is saved, and whole commands."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vdm.checkpoint import load_weights, read_manifest, verify
from vdm.components import load_part
from vdm.config import Config, load
from vdm.errors import UserError
from vdm.interop.convert import convert
from vdm.models import UNet3D, UNetConfig
from vdm.models.blocks import ResBlock
from vdm.pipeline import TextToVideo
from vdm.training.kinds import build_task
from vdm.training.loop import train
from vdm.training.lora import PACKED, LoRA, LoRATask, sample_of
from vdm.training.parallel import checkpoint_activations
from vdm.training.trainer import Trainer
from vdm.training.verify import differences

Command = Callable[..., Any]
ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "fixtures" / "tiny.yaml"
RANK, ALPHA = 3, 6.0
MODEL = ("model.attention_heads=8", "model.temporal_layers=4")  # all that diffusers can have
CONFIG = UNetConfig(
    unet_dim=16, channel_mult=(1, 2), attention_levels=(True, False), num_res_blocks=1, attention_heads=1,
    attention_head_dim=8, temporal_layers=2, context_dim=6, norm_num_groups=4, dropout=0.2,
)  # fmt: skip


@cache
def _network() -> UNet3D:
    torch.manual_seed(0)
    unet = UNet3D(CONFIG)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return unet.double().requires_grad_(False).eval()


def network() -> UNet3D:
    """A frozen UNet in float64, every weight of which does something."""
    return copy.deepcopy(_network())


def adapted(*, rank: int = RANK, alpha: float = ALPHA, stirred: bool = True) -> tuple[UNet3D, LoRA]:
    """A UNet with a LoRA of random numbers, in float64."""
    unet = network()
    lora = LoRA(unet, rank=rank, alpha=alpha, seed=5).double().eval()
    if stirred:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return unet, lora


def run(unet: UNet3D, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    latents, context = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 4, 3, 4, 4), (2, 5, 6)))
    return unet(latents, torch.tensor([3, 900]), context)


def factors(lora: LoRA, home: str, packed: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(A, B) of each piece of a packed projection."""
    pieces = [lora.get_submodule(f"{home}.{kind}") for kind in PACKED[packed]]
    return [(piece.lora_A.weight, piece.lora_B.weight) for piece in pieces]  # type: ignore[union-attr]


def projections(unet: UNet3D) -> dict[str, nn.Linear]:
    return {name: module for name, module in unet.named_modules() if re.search(r"\.to_(q|kv|qkv|out)$", name)}  # type: ignore[misc]


def dense(unet: UNet3D, lora: LoRA, strength: float) -> UNet3D:
    """The same UNet without hooks, its weights W + strength * B A."""
    other = network()
    for name, layer in projections(other).items():
        home, _, packed = name.rpartition(".")
        change = torch.cat([up @ down for down, up in factors(lora, home, packed)]).detach()
        layer.weight.data = projections(unet)[name].weight + strength * change
    return other


# ---- against dense matrices


@settings(max_examples=4)
@given(rank=st.integers(1, 20), alpha=st.floats(0.01, 100.0))
def test_every_projection_has_the_dense_change(rank: int, alpha: float) -> None:
    unet, lora = adapted(rank=rank, alpha=alpha)
    layers = projections(unet)
    assert len(layers) == 40
    for name, layer in layers.items():
        home, _, packed = name.rpartition(".")
        change = torch.cat([up @ down for down, up in factors(lora, home, packed)])
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
        want = F.linear(x, layer.weight + alpha / rank * change, layer.bias)
        torch.testing.assert_close(layer(x), want, rtol=1e-9, atol=1e-9)
        assert (F.linear(x, layer.weight, layer.bias) - want).abs().max() > 1e-5, "and it changes something"


def test_the_unet_is_that_of_the_dense_weights() -> None:
    unet, lora = adapted()
    want, plain = run(dense(unet, lora, ALPHA / RANK)), run(network())
    torch.testing.assert_close(run(unet), want, rtol=0.0, atol=1e-9 * want.abs().max().item())
    assert (plain - want).abs().max() > 1e-2 * want.abs().max()


def test_gradients_are_those_of_the_dense_weights() -> None:
    """dA = s B^T G and dB = s G A^T, with G the gradient of the dense weight."""
    unet, lora = adapted()
    run(unet).square().mean().backward()
    whole = dense(unet, lora, ALPHA / RANK)
    for layer in projections(whole).values():
        layer.weight.requires_grad_(True)
    run(whole).square().mean().backward()
    compared = 0
    for name, layer in projections(whole).items():
        home, _, packed = name.rpartition(".")
        pieces = factors(lora, home, packed)
        assert layer.weight.grad is not None
        for (down, up), gradient in zip(pieces, layer.weight.grad.chunk(len(pieces)), strict=True):
            for parameter, want in ((down, up.T @ gradient), (up, gradient @ down.T)):
                assert parameter.grad is not None
                want = ALPHA / RANK * want.detach()
                torch.testing.assert_close(parameter.grad, want, rtol=1e-7, atol=1e-12)
                compared += 1
    assert compared == len(list(lora.parameters())) == 2 * 72
    assert all(parameter.grad is None for parameter in unet.parameters()), "nothing else has one"


def test_at_first_it_changes_nothing_and_the_unet_keeps_its_names() -> None:
    plain = network()
    names, before = list(plain.state_dict()), run(plain)
    lora = LoRA(plain, rank=4, alpha=4.0, seed=0).double()
    lora.eval()
    assert torch.equal(run(plain), before)
    assert list(plain.state_dict()) == names
    assert all("lora" in name for name in lora.state_dict())


def test_its_numbers_are_those_of_the_seed_and_leave_the_global_generator_alone() -> None:
    unet = network()
    state = torch.get_rng_state()
    one, same, other = (LoRA(unet, rank=4, alpha=4.0, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]) is name.endswith("lora_B.weight"), "A is random, B is zero"
        bound = tensor.shape[1] ** -0.5  # kaiming with a = sqrt(5), as PEFT has it
        assert tensor.abs().max() <= bound and (name.endswith("lora_B.weight") or tensor.abs().max() > 0.8 * bound)


@pytest.mark.parametrize("low", [False, True])
def test_checkpointing_changes_no_gradient(low: bool) -> None:
    found, counts = [], []
    for checkpointed in (False, True):
        unet, lora = adapted()
        if low:
            unet.bfloat16()
            lora.float()
        if checkpointed:
            checkpoint_activations(unet, how="block")
        calls: list[nn.Module] = []
        keep = partial(lambda calls, module, *_: calls.append(module), calls)
        for module in unet.modules():
            if isinstance(module, ResBlock):
                module.register_forward_hook(keep)
        lora.train()  # and the UNet with it, or nothing were recomputed
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            run(unet, torch.float32 if low else torch.float64).float().square().mean().backward()
        found.append({name: p.grad for name, p in lora.named_parameters()})
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0]
    plain, recomputed = found
    for name, gradient in plain.items():
        assert gradient is not None and gradient.dtype == (torch.float32 if low else torch.float64)
        assert torch.equal(gradient, recomputed[name]), name


def test_the_unet_follows_the_mode_of_its_lora() -> None:
    unet, lora = adapted()
    still = run(unet)
    lora.train()
    assert unet.training and not torch.equal(run(unet), still), "dropout is on"
    lora.eval()
    assert not unet.training and torch.equal(run(unet), still)


@pytest.mark.slow
def test_a_layer_with_a_lora_is_one_graph_to_the_compiler() -> None:
    unet, lora = adapted()
    want = run(unet)
    for block in unet.encoder[:1]:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(unet), want)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.zero_()
    torch.testing.assert_close(run(unet), run(network()))  # the graph has the factors as they are, not as they were


# ---- runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model; not to be changed."""
    folder = tmp_path_factory.mktemp("base")
    return train(load(TINY, [f"run_dir={folder / 'run'}", "max_train_steps=3", "training.validation_steps=0", *MODEL]))


def overrides_of(base: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        f"run_dir={run_dir}", f"training.init_from={base}", "text.text_trainable=false", f"training.lora_rank={RANK}",
        f"training.lora_alpha={ALPHA}", "training.max_train_steps=4", "training.checkpointing_steps=2",
        "training.validation_steps=4", "training.learning_rate=0.1", *MODEL, *more,
    ]  # fmt: skip


def tiny(base: Path, run_dir: Path, *more: str) -> Config:
    return load(TINY, overrides_of(base, run_dir, *more))


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run; not to be changed."""
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    assert train(tiny(base, run_dir)) == run_dir / "final"
    return run_dir


def trainer_of(config: Config) -> Trainer:
    trainer = Trainer(config, build_task(config, torch.device("cpu")), Path(config.run_dir))
    for module in trainer.trained.values():
        module.train()
    return trainer


def step(trainer: Trainer) -> dict[str, float]:
    return trainer.train_step([next(trainer.train_batches())])


def test_a_step_changes_the_lora_and_nothing_else(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny(base, tmp_path))
    assert set(trainer.trained) == {"lora"}
    before = copy.deepcopy({part: module.state_dict() for part, module in trainer.task.modules.items()})
    assert set(before) == {"unet", "vae", "text", "lora"}
    first = step(trainer)["loss"]
    step(trainer)
    for part, module in trainer.task.modules.items():
        same = [torch.equal(tensor, before[part][name]) for name, tensor in module.state_dict().items()]
        assert all(same) is (part != "lora"), part
        assert part == "lora" or all(p.grad is None and not p.requires_grad for p in module.parameters())
    owned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in trainer.task.modules["lora"].parameters()}
    # At first it is the model itself: the same clips, noise and dropout.
    whole = load(TINY, [f"run_dir={tmp_path}", "text.text_trainable=false", *MODEL, f"vae.vae_weights={base}",
                        f"text.text_weights={base}"])  # fmt: skip
    plain = trainer_of(whole)
    load_part(plain.task.modules["unet"], base, "unet")
    assert step(plain)["loss"] == first


def test_a_lora_of_motion_alone(base: Path, tmp_path: Path) -> None:
    """With a rate of 0 for spatial layers the factors of temporal ones alone learn; the file holds no other change."""
    final = train(tiny(base, tmp_path / "run", "training.spatial_learning_rate=0"))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["grad_norm_temporal"] > 0 and "grad_norm_spatial" not in log[-1]
    changes = {
        name: t
        for name, t in safetensors.torch.load_file(final / "adapter_model.safetensors").items()
        if "lora_B" in name
    }
    temporal = {name for name in changes if "temp_attentions" in name or "transformer_in" in name}
    assert {name for name, tensor in changes.items() if tensor.any()} == temporal != set(changes)


@pytest.mark.slow
def test_alpha_is_the_rank_where_none_is_given(base: Path, tmp_path: Path) -> None:
    second = []
    for alpha in ("null", "3.0", "6.0"):
        trainer = trainer_of(tiny(base, tmp_path, f"training.lora_alpha={alpha}"))
        batch = next(trainer.train_batches())
        trainer.train_step([batch])
        second.append(trainer.train_step([batch])["loss"])
    assert second[0] == second[1] != second[2]


def test_the_model_may_be_kept_in_bfloat16_and_the_lora_is_not(base: Path, tmp_path: Path) -> None:
    losses = {}
    for dtype, precision in (("fp32", "no"), ("bf16", "bf16")):
        more = (f"training.weights_dtype={dtype}", f"training.mixed_precision={precision}")
        trainer = trainer_of(tiny(base, tmp_path, *more, "training.gradient_checkpointing=block"))
        losses[dtype, precision] = step(trainer)["loss"]
        dtypes = {part: {p.dtype for p in module.parameters()} for part, module in trainer.task.modules.items()}
        assert dtypes["unet"] == {torch.bfloat16 if dtype == "bf16" else torch.float32}
        assert dtypes["lora"] == dtypes["vae"] == dtypes["text"] == {torch.float32}
    exact, rounded = losses.values()
    assert exact != rounded == pytest.approx(exact, rel=0.02)


def test_what_a_run_saves(finished: Path, base: Path) -> None:
    for name, parts in (("checkpoint-4", {"lora", "lora.ema"}), ("final", {"adapter_model"})):
        manifest = verify(finished / name)
        assert set(manifest.parts) == parts and "adapter_config.json" in manifest.files
        assert manifest.info["training.lora_alpha"] == ALPHA
        size = sum(record.bytes for record in manifest.files.values())
        assert size < 0.5 * sum(record.bytes for record in read_manifest(base).files.values())
    settings = json.loads((finished / "final" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (RANK, ALPHA, "LORA")
    assert settings["base_model_name_or_path"] == str(base)
    averages, shipped = load_weights(finished / "checkpoint-4", "lora.ema"), load_weights(finished / "final",
                                                                                          "adapter_model")  # fmt: skip
    assert len(averages) == len(shipped) and all(name.startswith("base_model.model.") for name in shipped)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora_B.weight"
    assert torch.equal(
        shipped[f"base_model.model.{name}"], averages["encoder.0.spatial.block.attn1.to_k.lora_B.weight"]
    )
    text = load(finished / "config.yaml")
    assert text.vae.vae_weights == text.text.text_weights == str(base), "what is not given is the model's"


def test_the_merged_model_makes_the_clips_of_the_trained_one(finished: Path, base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny(base, tmp_path))
    trainer.restore(finished / "checkpoint-4")
    task = trainer.task
    assert isinstance(task, LoRATask)

    def clips(pipe: TextToVideo) -> Tensor:
        frames = pipe("holding a red ball", generator=torch.Generator().manual_seed(0), output_type="pt").frames
        assert isinstance(frames, Tensor)
        return frames

    with trainer.ema.applied():
        trained = clips(TextToVideo(trainer.config, task.parts))
        task.preview(tmp_path / "shown", next(trainer.held_out_batches(1)))
    assert (tmp_path / "shown" / "00.mp4").is_file()
    plain = clips(TextToVideo.from_pretrained(base))
    for folder in (finished / "final", finished / "checkpoint-4"):
        pipe = TextToVideo.from_pretrained(base)
        assert pipe.load_lora(folder) == 72
        assert (clips(pipe) - trained).abs().max() < 1e-5
    assert (plain - trained).abs().max() > 1e-3


def test_a_resumed_run_is_the_uninterrupted_one(finished: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2")
    torch.manual_seed(99)
    train(tiny(base, tmp_path), resume="latest")
    for name in ("checkpoint-4", "final"):
        assert list(differences(tmp_path / name, finished / name)) == []


@pytest.mark.slow
def test_the_model_may_come_in_another_layout(finished: Path, base: Path, tmp_path: Path) -> None:
    """The run goes on with the same model as a diffusers folder."""
    convert(base, tmp_path / "theirs", to="diffusers", say=lambda line: None)
    shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2")
    train(tiny(tmp_path / "theirs", tmp_path), resume="latest")
    assert list(differences(tmp_path / "final", finished / "final")) == []


def test_the_hash_of_a_model_notices_other_weights() -> None:
    unet = network()
    first = sample_of(unet)
    assert first == sample_of(network()) and len(first) == 16
    for name, parameter in list(unet.named_parameters())[::20]:
        kept = parameter.detach().clone()
        parameter.data[..., :] += 1e-3
        assert sample_of(unet) != first, name
        parameter.data.copy_(kept)
    assert sample_of(unet) == first


# ---- bad input


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("training.init_from=null",), "a random one is none; set training.init_from"),
        (("training.lora_rank=0",), "training.lora_rank must be at least 1"),
        (("training.lora_alpha=0",), "training.lora_alpha must be above 0"),
        (("training.lora_rank=null",), "lora_alpha is the strength of a LoRA; set training.lora_rank too, or neither"),
        (("text.text_trainable=true",), "of the UNet alone; set text.text_trainable to false"),
        (("training.task=vae",), "training.lora_rank is of the UNet, and training.task is vae"),
        (("training.init_from=PLACE/nowhere",), "nowhere does not exist"),
        (("model.unet_dim=32",), "model.unet_dim is 32, but .*, which this LoRA is to change, has 16; use that"),
        (("model.attention_head_dim=8",), "model.attention_head_dim is 8, but .* has 16"),
        (("diffusion.prediction_type=x0",), "diffusion.prediction_type is 'x0', but .* has 'v'"),
        (("diffusion.beta_end=0.02",), "diffusion.beta_end is 0.02, but .* has 0.012"),
        (("diffusion.noise_shift=2",), "diffusion.noise_shift is 2.0, but .* has 1.0"),
    ],
)
def test_bad_settings_are_named(
    more: tuple[str, ...], sentence: str, base: Path, tmp_path: Path, command: Command
) -> None:
    more = tuple(one.replace("PLACE", str(tmp_path)) for one in more)
    result = command("train.py", TINY, *overrides_of(base, tmp_path / "run", *more))
    assert re.search(sentence, result.error), result.error
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name != ".lock"]


def test_a_checkpoint_of_another_run_is_refused(finished: Path, base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pipe = TextToVideo.from_pretrained(base)
    pipe.unet.conv_in.weight.data += 1e-3
    pipe.save_pretrained(other)
    checkpoint = str(finished / "checkpoint-4")
    for config, sentence in (
        (tiny(other, tmp_path), "is of a run with hash of training.init_from .*, not .*; resume it with that"),
        (tiny(base, tmp_path, "training.lora_alpha=5"), r"may not change: training.lora_alpha \(6.0 -> 5.0\)"),
        (tiny(base, tmp_path, "training.lora_rank=4"), r"may not change: training.lora_rank \(3 -> 4\)"),
        (
            load(TINY, [f"run_dir={tmp_path}", *MODEL]),
            "may not change: .*training.lora_rank",
        ),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            train(config, resume=checkpoint)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="may not change: text.text_trainable .*training.lora_rank"):
        train(tiny(base, tmp_path), resume=str(base.parent / "checkpoint-3"))


@pytest.mark.parametrize("name", ["final", "checkpoint-4"])
def test_a_lora_is_no_model_and_says_how_it_is_used(finished: Path, base: Path, name: str, command: Command) -> None:
    error = command("sample.py", "--checkpoint", finished / name).error
    assert f"{finished / name} is a LoRA, not a whole model" in error
    assert f"sample.py --checkpoint {base} --lora_path {finished / name}" in error
    with pytest.raises(UserError, match="is a LoRA, not a whole model"):
        train(load(TINY, [f"run_dir={finished.parent / name}", f"training.init_from={finished / name}"]))


@pytest.mark.parametrize(("name", "file"), [("final", "adapter_model"), ("checkpoint-4", "lora.ema")])
def test_a_damaged_lora_is_not_merged(finished: Path, base: Path, tmp_path: Path, name: str, file: str) -> None:
    copy = shutil.copytree(finished / name, tmp_path / name) / f"{file}.safetensors"
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    with pytest.raises(UserError, match=f"{file}.safetensors is damaged, for its SHA-256 differs"):
        TextToVideo.from_pretrained(base).load_lora(tmp_path / name)


# ---- the config that ships


def test_the_config_for_a_small_card_has_the_numbers_of_its_comments() -> None:
    path = ROOT / "configs" / "12gb-lora.yaml"
    config, text = load(path), path.read_text(encoding="utf-8")
    assert config.training.lora_rank == 16 and config.data.cache_dir is not None
    with torch.device("meta"):
        unet = UNet3D(config.model)
        lora = LoRA(unet, rank=16, alpha=16.0, seed=0)
    weights, learn = (sum(p.numel() for p in module.parameters()) for module in (unet, lora))
    assert f"{weights:,} weights in bfloat16" in text and f"{learn:,} numbers of the LoRA" in text
    sums = [float(number) for number in re.findall(r"^#   (\d\.\d\d)  ", text, flags=re.MULTILINE)]
    assert sums[0] == round(2 * weights / 1e9, 2) and sums[1] == round(5 * 4 * learn / 1e9, 2)
    assert sums[-1] == pytest.approx(sum(sums[:-1]))


# ---- whole commands, and the oracle


@pytest.mark.slow
def test_from_training_to_clips_by_commands(base: Path, tmp_path: Path, shell: Command, command: Command) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(tiny(base, whole))
    stopped = shell("train.py", TINY, *overrides_of(base, halves, "training.stop_after_steps=2"))
    assert stopped.code == 0 and "--resume latest goes on" in stopped.out
    resumed = shell("train.py", TINY, *overrides_of(base, halves), "--resume", "latest")
    assert resumed.code == 0 and f"finished: {halves / 'final'}" in resumed.out
    for name in ("checkpoint-4", "final"):
        assert list(differences(whole / name, halves / name)) == []
    file = "adapter_model.safetensors"
    assert (whole / "final" / file).read_bytes() == (halves / "final" / file).read_bytes()

    sample = ("sample.py", "--prompt", "ball", "--checkpoint", base, "--output_dir")
    with_it = shell(*sample, tmp_path / "with", "--lora_path", halves / "final")
    assert with_it.code == 0 and "merged a LoRA of 72 layers" in with_it.out
    assert command(*sample, tmp_path / "none", "--lora_path", halves / "final", "--lora_scale", "0").code == 0
    assert command(*sample, tmp_path / "without").code == 0
    clips = {name: (tmp_path / name / "00000-ball.mp4").read_bytes() for name in ("with", "none", "without")}
    assert clips["none"] == clips["without"] != clips["with"]
    low = (
        "training.weights_dtype=bf16",
        "training.mixed_precision=bf16",
        "training.gradient_checkpointing=block",
        "training.max_train_steps=2",
    )
    proof = command("train.py", TINY, *overrides_of(base, tmp_path / "proof", *low), "--verify_resume")
    assert proof.code == 0 and "bit for bit" in proof.out, proof


@pytest.mark.slow
def test_from_a_cache_neither_autoencoder_nor_text_tower_is_there(base: Path, tmp_path: Path, shell: Command) -> None:
    cached = f"data.cache_dir={tmp_path / 'cache'}"
    made = shell("-m", "vdm", "data", "cache", TINY, *overrides_of(base, tmp_path / "run", cached), "--dtype", "fp32")
    assert made.code == 0, made
    train(tiny(base, tmp_path / "files"))
    config = tiny(base, tmp_path / "run", cached)
    assert set(build_task(config, torch.device("cpu")).modules) == {"unet", "lora"}
    train(config)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("files", "run")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    train(config, resume="latest")
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.parity
def test_peft_reads_it_and_names_it_alike(finished: Path, base: Path, tmp_path: Path) -> None:
    """On diffusers' UNet of the same weights: its output with the LoRA is ours, loaded or merged."""
    peft = pytest.importorskip("peft")
    from diffusers import UNet3DConditionModel

    convert(base, tmp_path / "theirs", to="diffusers", say=lambda line: None)
    model = peft.PeftModel.from_pretrained(
        UNet3DConditionModel.from_pretrained(tmp_path / "theirs" / "unet"), finished / "final"
    ).eval()
    ours = load_weights(finished / "final", "adapter_model")
    theirs = peft.get_peft_model_state_dict(model)
    assert set(theirs) == set(ours) and all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    pipe = TextToVideo.from_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 4, 3, 6, 5, generator=generator), torch.randn(2, 7, 16, generator=generator)
    t = torch.tensor([10, 900])
    with torch.no_grad():
        plain, want = pipe.unet(latents, t, context), model(latents, t, context).sample
        pipe.load_lora(finished / "final")
        have = pipe.unet(latents, t, context)
        merged = model.merge_and_unload()(latents, t, context).sample
    assert (have - want).abs().max() < 1e-5 * want.abs().max()
    assert (merged - want).abs().max() < 1e-5 * want.abs().max()
    assert (plain - want).abs().max() > 1e-3 * want.abs().max()
