"""Every key of a config does what it is there for: flipped alone, it changes what can be seen where it acts.

A row of the table says where one looks, the value that the key is flipped to, and what else must be set for it to
matter. What is seen must differ from what is seen without the flip; keys that other tests flip are named below.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vdm.components import build_text_encoder, build_vae
from vdm.config import _TYPES, Config, load
from vdm.data.dataset import ClipDataset
from vdm.data.loader import batches
from vdm.data.mini_something import write_ssv2
from vdm.diffusion import NoiseSchedule, ddim_sample
from vdm.errors import UserError
from vdm.models import UNet3D
from vdm.pipeline import TextToVideo
from vdm.training.groups import choose_what_learns
from vdm.training.kinds import build_task
from vdm.training.limits import Limits
from vdm.training.loop import train
from vdm.training.optim import build_optimizer, learning_rate
from vdm.training.task import UNetTask
from vdm.training.trainer import Trainer

TESTS = Path(__file__).parent
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Bench:
    """What all views share: where files may be written, clips as files, and one model."""

    folder: Path
    clips: Path
    task: UNetTask

    def config(self, *overrides: str) -> Config:
        texts = [text.replace("CLIPS", str(self.clips)) for text in overrides]
        return load(TESTS / "fixtures" / "tiny.yaml", [*texts])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    write_ssv2(folder / "clips", num_clips=12, size=24, num_frames=6, fps=12.0, seed=0)
    min((folder / "clips").glob("*/*.mp4")).unlink()  # one is missing
    task = build_task(load(TESTS / "fixtures" / "tiny.yaml"), CPU)
    assert isinstance(task, UNetTask)
    stir = torch.Generator().manual_seed(1)  # zero-initialised layers would hide the text and the frames
    with torch.no_grad():
        for parameter in task.modules["unet"].parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=stir)
    return Bench(folder, folder / "clips", task)


# ---- where one looks


def unet(config: Config, bench: Bench) -> object:
    """The layers and their shapes, and whether seven frames may pass."""
    model = UNet3D(config.model)
    try:
        with torch.no_grad():
            z, context = torch.zeros(1, config.model.in_channels, 7, 2, 2), torch.zeros(1, 3, config.model.context_dim)
            model(z, torch.zeros(1), context)
        passes = True
    except UserError:
        passes = False
    return repr(model), [tuple(p.shape) for p in model.parameters()], passes


def vae(config: Config, bench: Bench) -> object:
    """The layers, and the scale of a latent."""
    model, size = build_vae(config), 2 * config.vae.factor
    latents = model.encode(torch.ones(1, config.vae.image_channels, 1, size, size)).mode()
    return repr(model), [tuple(p.shape) for p in model.parameters()], float(latents.detach().abs().sum())


def text(config: Config, bench: Bench) -> object:
    """The layers, and the tokens and context of a prompt."""
    tower = build_text_encoder(config)
    return repr(tower), tower.tokens(["a ball"]).tolist(), tower(["a ball"]).detach().sum().item()


def learns(config: Config, bench: Bench) -> object:
    """The parts that are trained."""
    task = copy.copy(bench.task)
    task.config = config
    return sorted(task.trained())


def schedule(config: Config, bench: Bench) -> object:
    """The tables of the noise schedule."""
    tables = NoiseSchedule(config.diffusion)
    x, noise, t = torch.full((1, 1), 0.3), torch.full((1, 1), 0.7), torch.tensor([2])
    return {name: table.tolist() for name, table in tables.named_buffers()}, tables.target(x, noise, t).tolist()


def sampler(config: Config, bench: Bench) -> object:
    """Where seven DDIM steps lead, with a denoiser that is a formula."""
    x = 3.0 * torch.randn(1, 2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    tables = NoiseSchedule(config.diffusion)
    return ddim_sample(lambda x, t: (0.5 * x + 0.001 * t[0]).tanh(), x, tables, num_steps=7).tolist()


def clips(config: Config, bench: Bench) -> object:
    """The first samples, and what is held out."""
    train, held = (
        ClipDataset(config.data, split=split, seed=config.seed, batch_size=2)  # type: ignore[arg-type]
        for split in ("train", "validation")
    )
    seen = [train[position] for position in range(6)]
    told = [(s["id"], s["caption"], s["video"].tolist()) for s in seen]
    return told, len(train), len(held)


def stream(config: Config, bench: Bench) -> object:
    """What the task reads, and how much of it makes a step."""
    task = copy.copy(bench.task)
    task.config = config
    data = task.dataset("train")
    return tuple(data[0]["video"].shape), data.batch_size


def optimizer(config: Config, bench: Bench) -> object:
    """The kind, and the groups of parameters with all their settings."""
    modules = {"unet": UNet3D(config.model), "text": torch.nn.Linear(2, 2)}
    choose_what_learns(modules, config.training)
    made = build_optimizer(modules, config.training)
    return type(made), [{**group, "params": len(group["params"])} for group in made.param_groups]


def rates(config: Config, bench: Bench) -> object:
    """The learning rate of a run whose every step takes a minute, until it ends."""
    settings, found = config.training, []
    limits = Limits.of(settings, num_clips=16, clips_per_step=2)
    while not limits.reached(len(found), seconds=60.0 * len(found)):
        done = limits.done(len(found), warmup=settings.warmup_steps, seconds=60.0 * len(found))
        found.append(learning_rate(len(found), settings, done=done))
    return found


def loss(config: Config, bench: Bench) -> object:
    """Of the first clips, by one network."""
    task = copy.copy(bench.task)
    task.config = config
    (batch,) = batches(task.dataset("train"), batch_size=2, num_batches=1)
    return task.losses(batch, training=True)["loss"].item()


def step(config: Config, bench: Bench) -> object:
    """A step of training: its numbers, a weight after it and that weight's average."""
    trainer = Trainer(config, build_task(config, CPU), bench.folder / "step")
    reader = trainer.train_batches()
    count = trainer.settings.gradient_accumulation_steps
    for _ in range(2):
        numbers = trainer.train_step([next(reader) for _ in range(count)])
    part, module = next(iter(trainer.trained.items()))
    name, weight = next(iter(module.named_parameters()))
    return numbers, weight.detach().double().sum().item(), trainer.ema.shadow[part][name].double().sum().item()


def run(config: Config, bench: Bench) -> object:
    """A run: the steps that it logs, with what, and the files that it leaves."""
    number = len(list(bench.folder.glob("run-*")))
    folder = bench.folder / f"run-{number}"
    train(replace(config, run_dir=str(folder)))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "tensorboard" not in path.parts)
    return [sorted(record) for record in log], [record["step"] for record in log], left


def frames(config: Config, bench: Bench) -> object:
    """A clip for one prompt, from one seed."""
    pipe = TextToVideo(config, bench.task.parts)
    video = pipe("a red ball", generator=[torch.Generator().manual_seed(0)], output_type="pt").frames
    assert isinstance(video, torch.Tensor)
    return tuple(video.shape), float(video.double().sum())


def places(config: Config, bench: Bench) -> object:
    """Where a run goes."""
    return config.run_dir


# ---- the table

View = Callable[[Config, Bench], object]
FILES = ("data.format=ssv2", "data.root=CLIPS", "data.num_clips=null", "data.max_bad_share=0.5", "min_frames=2")
VAE = ("training.task=vae",)
RUN = (*VAE, "max_train_steps=4", "validation_steps=0", "log_steps=2", "checkpointing_steps=1", "validation_clips=1")
LEADING = "timestep_spacing=leading"
TABLE: dict[str, tuple[Any, ...]] = {
    "name": (places, "other"),
    "run_dir": (places, "elsewhere"),
    "seed": (clips, "1"),
    "model.model_type": (unet, "spatial"),
    "model.in_channels": (unet, "8", *VAE),
    "model.unet_dim": (unet, "32"),
    "model.channel_mult": (unet, "[1, 1]"),
    "model.attention_levels": (unet, "[true, true]"),
    "model.num_res_blocks": (unet, "2"),
    "model.attention_heads": (unet, "2"),
    "model.attention_head_dim": (unet, "8"),
    "model.temporal_layers": (unet, "3"),
    "model.context_dim": (unet, "32", *VAE),
    "model.norm_num_groups": (unet, "4"),
    "model.dropout": (unet, "0.3"),
    "model.temporal_dropout": (unet, "0.3"),
    "model.max_num_frames": (unet, "4"),
    "vae.image_channels": (vae, "4"),
    "vae.latent_channels": (vae, "8", *VAE),
    "vae.vae_channels": (vae, "[8, 8, 16]"),
    "vae.layers_per_block": (vae, "2"),
    "vae.vae_norm_num_groups": (vae, "2"),
    "vae.scaling_factor": (vae, "0.5"),
    "vae.temporal_decoder": (vae, "true"),
    "text.text_width": (text, "32", *VAE),
    "text.text_heads": (text, "2"),
    "text.text_layers": (text, "3"),
    "text.context_length": (text, "12"),
    "text.pad_token_id": (text, "49407"),
    "text.text_trainable": (learns, "false"),
    "diffusion.num_train_timesteps": (schedule, "500"),
    "diffusion.beta_schedule": (schedule, "linear"),
    "diffusion.beta_start": (schedule, "0.001"),
    "diffusion.beta_end": (schedule, "0.02"),
    "diffusion.prediction_type": (schedule, "x0"),
    "diffusion.zero_terminal_snr": (schedule, "true"),
    "diffusion.noise_shift": (schedule, "2"),
    "diffusion.loss_weighting": (schedule, "min_snr"),
    "diffusion.min_snr_gamma": (schedule, "2", "loss_weighting=min_snr"),
    "diffusion.trained_betas": (schedule, "[0.1, 0.2, 0.3, 0.4]", "num_train_timesteps=4"),
    "diffusion.timestep_spacing": (sampler, "leading"),
    "diffusion.steps_offset": (sampler, "0", LEADING),
    "diffusion.set_alpha_to_one": (sampler, "false"),
    "diffusion.ddim_stride": (sampler, "constant"),
    "diffusion.clip_sample": (sampler, "true"),
    "diffusion.clip_sample_range": (sampler, "0.5", "clip_sample=true"),
    "diffusion.thresholding": (sampler, "true"),
    "diffusion.dynamic_thresholding_ratio": (sampler, "0.5", "thresholding=true", "sample_max_value=3"),
    "diffusion.sample_max_value": (sampler, "3", "thresholding=true"),
    "data.format": (clips, "folder", *FILES),
    "data.root": (clips, "CLIPS/nowhere", *FILES),
    "data.num_clips": (clips, "3", *FILES),
    "data.subset_order": (clips, "first", *FILES, "data.num_clips=3"),
    "data.subset_seed": (clips, "1", *FILES, "data.num_clips=3"),
    "data.max_clips_per_template": (clips, "1", *FILES),
    "data.templates": (clips, '["Covering something with something"]', *FILES),
    "data.short_clips": (clips, "loop", *FILES, "max_frames=8"),
    "data.height": (clips, "8"),
    "data.width": (clips, "8"),
    "data.fps": (clips, "3"),
    "data.min_frames": (clips, "1"),
    "data.max_frames": (clips, "6"),
    "data.image_batch_share": (clips, "1"),
    "data.crop": (clips, "centre", *FILES, "data.width=8"),
    "data.horizontal_flip": (clips, "1", *FILES),
    "data.color_jitter": (clips, "0.5", *FILES),
    "data.natural_captions": (clips, "1", *FILES),
    "data.template_captions": (clips, "1", *FILES),
    "data.max_bad_share": (clips, "0.01", *FILES),
    "data.cache_latents": (stream, "true"),
    "data.validation_clips": (clips, "2"),
    "training.task": (step, "text", *VAE),
    "training.batch_size": (stream, "3"),
    "training.gradient_accumulation_steps": (stream, "3"),
    "training.effective_batch_size": (places, "7"),
    "training.num_gpus": (places, "2", "training.effective_batch_size=2"),
    "training.optimizer": (optimizer, "muon"),
    "training.learning_rate": (optimizer, "1e-3"),
    "training.spatial_learning_rate": (optimizer, "1e-3"),
    "training.temporal_learning_rate": (optimizer, "0"),
    "training.text_learning_rate": (optimizer, "1e-3"),
    "training.lr_scheduler": (rates, "linear"),
    "training.min_learning_rate": (rates, "1e-3"),
    "training.decay_share": (rates, "0.5", "lr_scheduler=wsd"),
    "training.warmup_steps": (rates, "5"),
    "training.max_train_steps": (rates, "10"),
    "training.max_train_epochs": (rates, "1"),
    "training.max_train_hours": (rates, "0.1"),
    "training.weight_decay": (optimizer, "0.5"),
    "training.adam_beta1": (optimizer, "0.5"),
    "training.adam_beta2": (optimizer, "0.5"),
    "training.epsilon": (optimizer, "1e-3"),
    "training.max_grad_norm": (step, "1e-3", *VAE, "training.epsilon=1"),
    "training.ema_decay": (step, "0", *VAE),
    "training.caption_dropout": (loss, "1"),
    "training.timestep_sampling": (loss, "logit_normal"),
    "training.logit_mean": (loss, "-2", "training.timestep_sampling=logit_normal"),
    "training.logit_std": (loss, "3", "training.timestep_sampling=logit_normal"),
    "training.offset_noise": (loss, "0.1"),
    "training.frame_noise_correlation": (loss, "0.5"),
    "training.mixed_precision": (step, "bf16", *VAE),
    "training.kl_weight": (step, "1", *VAE),
    "training.colour_weight": (step, "1", *VAE),
    "training.edge_weight": (step, "1", *VAE),
    "training.log_steps": (run, "1", *RUN),
    "training.checkpointing_steps": (run, "2", *RUN),
    "training.keep_checkpoints": (run, "2", *RUN),
    "training.keep_every": (run, "2", *RUN, "keep_checkpoints=1"),
    "training.stop_after_steps": (run, "2", *RUN),
    "training.validation_steps": (run, "2", *RUN),
    "training.preview_steps": (run, "2", *RUN),
    "sampling.num_frames": (frames, "2"),
    "sampling.height": (frames, "8"),
    "sampling.width": (frames, "8"),
    "sampling.num_inference_steps": (frames, "3"),
    "sampling.sampler": (frames, "ddpm"),
    "sampling.eta": (frames, "1"),
    "sampling.guidance_scale": (frames, "5"),
    "sampling.guidance_rescale": (frames, "0.7"),
    "sampling.pag_scale": (frames, "2"),
    "sampling.pag_layers": (frames, "all", "sampling.pag_scale=2"),
    "sampling.negative_prompt": (frames, "a blue box"),
}
VIEWS: list[View] = [unet, vae, text, learns, schedule, sampler, clips, stream, optimizer, rates, loss, step, run]
VIEWS += [frames, places]
# Keys that are flipped elsewhere: they want a file of weights, a GPU, a worker process or a longer run.
ELSEWHERE = {
    "model.attention_kernel": "kernels/test_in_unet.py",
    "vae.vae_weights": "integration/test_resume.py",
    "text.text_weights": "text/test_pretrained.py",
    "data.dataloader_num_workers": "data/test_loader.py",
    "data.decode_timeout": "data/test_loader.py",
    "data.pin_memory": "data/test_loader.py",
    "data.cache_dir": "integration/test_cache_command.py",
    "data.cache_crops": "data/test_latents.py",
    "training.init_from": "training/test_loop.py",
    "training.keep_best": "integration/test_signals.py",
    "training.max_bad_steps": "training/test_faults.py",
    "training.preview_prompts": "training/test_task.py",
    "sampling.sampling_fps": "test_generate.py",
    "sampling.guidance_at_once": "test_pipeline.py",
    "sampling.vae_tile": "test_pipeline.py",
    "sampling.cuda_graph": "test_replay.py",
    "training.gradient_checkpointing": "training/test_loop.py",
    "training.weights_dtype": "training/test_low_memory.py",
    "training.optimizer_states": "training/test_low_memory.py",
    "training.optimizer_in_backward": "training/test_low_memory.py",
    "training.ema_offload": "training/test_low_memory.py",
    "training.compile": "training/test_parallel.py",
    "training.cuda_graph": "test_replay.py",
    "training.parallel": "integration/test_distributed.py",
    "training.lora_rank": "training/test_low_rank.py",
    "training.lora_alpha": "training/test_low_rank.py",
    "training.save_in_background": "training/test_saving.py",
    "training.rehearsal": "training/test_rehearsal.py",
    "training.diagnostics": "training/test_diagnostics.py",
}


def seen(view: View, bench: Bench, *overrides: str) -> object:
    """What a view shows of a config; a refusal is what it says."""
    try:
        return view(bench.config(*overrides), bench)
    except UserError as error:
        return str(error)


@pytest.fixture(scope="module")
def unflipped(bench: Bench) -> Callable[..., object]:
    """What is seen before the flip; each once."""
    known: dict[tuple[Any, ...], object] = {}

    def unflipped(view: View, *overrides: str) -> object:
        place = (view, *overrides)
        if place not in known:
            known[place] = view(bench.config(*overrides), bench)
        return known[place]

    return unflipped


def slow_if_a_run(view: View) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.slow,) if view is run else ()


@pytest.mark.parametrize("key", [pytest.param(key, marks=slow_if_a_run(row[0])) for key, row in TABLE.items()])
def test_a_key_acts(key: str, bench: Bench, unflipped: Callable[..., object]) -> None:
    view, value, *others = TABLE[key]
    before = unflipped(view, *others)
    assert seen(view, bench, *others, f"{key}={value}") != before


@pytest.mark.parametrize("view", [pytest.param(view, marks=slow_if_a_run(view)) for view in VIEWS])
def test_what_is_seen_is_the_same_where_nothing_is_flipped(
    view: View, bench: Bench, unflipped: Callable[..., object]
) -> None:
    """Else any flip would seem to act."""
    others: tuple[str, ...] = {step: VAE, run: RUN}.get(view, ())
    assert seen(view, bench, *others) == unflipped(view, *others)


def test_every_key_is_in_one_of_the_two_tables() -> None:
    keys = {f"{section}.{key}".lstrip(".") for section, key in _TYPES}
    assert keys == TABLE.keys() | ELSEWHERE.keys() and not TABLE.keys() & ELSEWHERE.keys()
    assert {row[0] for row in TABLE.values()} == set(VIEWS)


@pytest.mark.parametrize("key", ELSEWHERE)
def test_what_is_flipped_elsewhere_is_named_there(key: str) -> None:
    path = TESTS / ELSEWHERE[key]
    assert key.rpartition(".")[2] in path.read_text(encoding="utf-8")
