"""How closely vdm agrees with diffusers and transformers, part by part: `python benchmarks/parity.py` (extra `parity`).

Both sides hold the same random weights, in float32 on the CPU, and get the same input. An error is the largest absolute
difference over the largest absolute value of theirs; of frames, which are in [0, 1], the largest absolute difference.
`--full` adds the 1.41 B-parameter UNet, which takes about 12 GB of memory, one model after the other. `--original` adds
the original's own code; see original.py.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.common import environment, write_json
from benchmarks.oracles import (
    fitting,
    inputs,
    randomise,
    relative,
    take,
    their_pipeline,
    their_text,
    their_unet,
    their_vae,
)
from benchmarks.original import compare
from vdm import TextToVideo
from vdm.cli import Parser, run
from vdm.config import load
from vdm.diffusion import DiffusionConfig, NoiseSchedule, SamplingConfig, ddim_sample, ddpm_sample
from vdm.errors import UserError
from vdm.interop.convert import convert
from vdm.interop.diffusers_json import folder_json
from vdm.interop.links import to_ours
from vdm.interop.names import text_links, unet_links, vae_links
from vdm.models import UNet3D, UNetConfig, VAEConfig, VideoVAE
from vdm.text.encoder import TextConfig, TextEncoder
from vdm.weights import Weights, open_weights

ROOT = Path(__file__).resolve().parents[1]
SMALL = UNetConfig(
    unet_dim=32, channel_mult=(1, 2, 3), attention_levels=(True, True, False), num_res_blocks=1, attention_head_dim=8,
    context_dim=24, norm_num_groups=8,
)  # fmt: skip
MID = UNetConfig(unet_dim=64, attention_head_dim=16, context_dim=96, norm_num_groups=16)
SMALL_VAE = VAEConfig(vae_channels=(16, 32, 32), vae_norm_num_groups=8)
SMALL_TEXT = TextConfig(text_width=24, text_heads=3, text_layers=4)
PROMPTS = ("a hand pushes a red cup, slowly", "picking something up; it's 12 o'clock")
NEGATIVE = "blurred, low quality"
SHAPES = ((1, 1, 8, 8), (3, 5, 7, 10), (1, 24, 6, 4), (2, 3, 9, 5), (5, 2, 4, 12))  # batch, frames, height, width


class Row(NamedTuple):
    """One line of the table."""

    what: str
    against: str
    error: float
    bound: float  # that the tests hold it to
    detail: str


# Two right gradients in float32 differ by the rounding of both: over seven shapes ours were off by up to 1.1e-5 against
# float64, diffusers' by up to 6.7e-6. In float64 the tests hold them to 1e-9 of each other.
GRADIENTS = 2e-5


def unet_errors(
    config: UNetConfig, shape: tuple[int, int, int, int], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Errors of the output, and of the gradient of all parameters together: their largest over all tensors.

    A gradient's error is relative to the largest value of its own tensor, but no smaller than 1e-3 of the largest of
    all: those of biases before a norm are zero but for rounding.
    """
    theirs = randomise(their_unet(config), seed).to(dtype)
    ours, links = UNet3D(config).eval().to(dtype), unet_links(config, "diffusers")
    take(ours, links, theirs.state_dict())
    latents, timesteps, context = inputs(config, shape, seed)
    latents, context = latents.to(dtype), context.to(dtype)
    out, expected = ours(latents, timesteps, context), theirs(latents, timesteps, context).sample
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1))
    (out * weight).mean().backward()
    (expected * weight).mean().backward()
    grads = Weights.of({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    packed, _ = to_ours("gradients", links, grads, ours.state_dict(), source="theirs")
    floor = 1e-3 * max(packed[name].abs().max().item() for name in packed)
    worst = 0.0
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        scale = max(packed[name].abs().max().item(), floor)
        worst = max(worst, (parameter.grad - packed[name]).abs().max().item() / scale)
    return relative(out.detach(), expected.detach()), worst


@torch.no_grad()
def vae_errors(config: VAEConfig, *, seed: int = 0) -> tuple[float, float]:
    """Errors of the moments and of the decoded frames."""
    theirs = randomise(their_vae(config), seed)
    ours = VideoVAE(config).eval()
    take(ours, vae_links(config, "diffusers"), theirs.state_dict())
    generator = torch.Generator().manual_seed(seed)
    video = torch.rand(3, 3, 2, 3 * config.factor, 5 * config.factor, generator=generator) * 2 - 1
    moments = theirs.encode(video.transpose(1, 2).flatten(0, 1)).latent_dist.parameters
    z = torch.randn(3, config.latent_channels, 2, 3, 5, generator=generator)
    frames = theirs.decode(z.transpose(1, 2).flatten(0, 1)).sample
    fold = lambda x: x.transpose(1, 2).flatten(0, 1)  # noqa: E731
    encoded = relative(fold(ours.encode(video).moments), moments)
    return encoded, relative(fold(ours.decode(z * config.scaling_factor)), frames)


@torch.no_grad()
def text_error(config: TextConfig, *, seed: int = 0) -> float:
    """Error of the context, for prompts of several lengths."""
    theirs = randomise(their_text(config), seed)
    ours = TextEncoder(config).eval()
    state = {name.removeprefix("text_model."): tensor for name, tensor in theirs.state_dict().items()}
    take(ours, text_links(config, "transformers"), state, prefix="text_model.")
    prompts = [*PROMPTS, "", "word " * 100]
    return relative(ours(prompts), theirs(ours.tokens(prompts)).last_hidden_state)


def network(x: Tensor, t: Tensor) -> Tensor:
    """Any smooth function will do as the denoiser when samplers are compared."""
    return (1.3 * x + 0.2).sin() + 0.3 * (t / 1000).reshape(-1, *[1] * (x.ndim - 1))


@torch.no_grad()
def sampler_error(
    config: DiffusionConfig, num_steps: int, *, sampler: str = "ddim", eta: float = 0.0, seed: int = 0
) -> float:
    """Error of the largest step of a whole loop, in float64, on one table of alphas_cumprod.

    diffusers builds that table in float32, and `tests/diffusion/test_parity.py` compares the tables themselves.
    """
    import diffusers

    schedule = NoiseSchedule(config)
    tree = {k: v for k, v in folder_json(fitting(diffusion=config))["scheduler"].items() if k != "_class_name"}
    kind = diffusers.DDIMScheduler if sampler == "ddim" else diffusers.DDPMScheduler
    scheduler = kind(**{key: value for key, value in tree.items() if sampler == "ddim" or key != "set_alpha_to_one"})
    betas = torch.tensor(schedule.trained_betas(), dtype=torch.float64)
    scheduler.betas, scheduler.alphas = betas, 1.0 - betas
    scheduler.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    if sampler == "ddim":
        scheduler.final_alpha_cumprod = torch.tensor(schedule.final_alpha_cumprod, dtype=torch.float64)
    scheduler.set_timesteps(num_steps)

    x = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws = [torch.Generator().manual_seed(seed + 1 + i) for i in range(len(x))]
    path: list[Tensor] = []
    keep = lambda index, t, x: path.append(x)  # noqa: E731
    options: dict[str, Any] = {"num_steps": num_steps, "generators": draws, "callback": keep}
    if sampler == "ddim":
        ddim_sample(network, x, schedule, eta=eta, **options)
    else:
        ddpm_sample(network, x, schedule, **options)

    draws, worst = [torch.Generator().manual_seed(seed + 1 + i) for i in range(len(x))], 0.0
    with _noise_of(draws, x.shape):
        for ours, t in zip(path, scheduler.timesteps, strict=True):
            # Frame by frame, as their pipeline does.
            fold = [z.transpose(1, 2).flatten(0, 1) for z in (network(x, t.expand(len(x))), x)]
            extra = {"eta": eta} if sampler == "ddim" else {}
            x = scheduler.step(fold[0], int(t), fold[1], **extra).prev_sample.unflatten(0, (2, -1)).transpose(1, 2)
            worst = max(worst, relative(ours, x))
    return worst


@contextmanager
def _noise_of(draws: Sequence[torch.Generator], shape: Sequence[int]) -> Iterator[None]:
    """Let diffusers' schedulers draw what ours do: in float32, each clip from its own generator."""
    from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

    def draw(*args: Any, **kwargs: Any) -> Tensor:
        B, C, T, h, w = shape
        return torch.cat([torch.randn(T, C, h, w, generator=one) for one in draws]).double()

    real = scheduling_ddim.randn_tensor, scheduling_ddpm.randn_tensor
    scheduling_ddim.randn_tensor = scheduling_ddpm.randn_tensor = draw
    try:
        yield
    finally:
        scheduling_ddim.randn_tensor, scheduling_ddpm.randn_tensor = real


def frame_error(ours: TextToVideo, theirs: Any, *, num_steps: int = 50, guidance_scale: float = 9.0) -> float:
    """The largest difference between the frames of both, from the same noise and the same prompts."""
    shape = (len(PROMPTS), ours.config.model.in_channels, 4, 6, 8)
    options: dict[str, Any] = {
        "negative_prompt": [NEGATIVE, ""], "num_inference_steps": num_steps, "guidance_scale": guidance_scale,
        "num_frames": shape[2], "height": shape[3] * ours.vae.config.factor, "width": shape[4] * ours.vae.config.factor,
        "latents": torch.randn(shape, generator=torch.Generator().manual_seed(7)),
    }  # fmt: skip
    made, expected = ours(list(PROMPTS), **options).frames, theirs(list(PROMPTS), **options).frames
    assert made.shape == expected.shape
    return float(abs(made - expected).max())


END_TO_END = fitting(
    model=SMALL, vae=SMALL_VAE, text=SMALL_TEXT, sampling=SamplingConfig(height=24, width=32),
    diffusion=DiffusionConfig(timestep_spacing="leading", set_alpha_to_one=False, ddim_stride="constant"),
)  # fmt: skip


def opened_here(folder: Path) -> float:
    """A pipeline that diffusers saved, opened by vdm."""
    theirs = their_pipeline(folder, END_TO_END)
    return frame_error(TextToVideo.from_pretrained(folder / "saved"), theirs)


def opened_there(folder: Path) -> float:
    """The shipped demo model, exported, opened by stock diffusers."""
    from diffusers import DiffusionPipeline

    convert(ROOT / "vdm" / "assets" / "demo", folder / "demo", to="diffusers", say=lambda line: None)
    theirs = DiffusionPipeline.from_pretrained(folder / "demo")
    theirs.set_progress_bar_config(disable=True)
    return frame_error(TextToVideo.from_pretrained(), theirs)


@torch.no_grad()
def full_size_error() -> float:
    """One forward pass of `configs/a100.yaml`'s UNet at 2 frames of 64x64 pixels, one model after the other."""
    config = load(ROOT / "configs" / "a100.yaml").model
    latents, timesteps, context = inputs(config, (1, 2, 8, 8))
    theirs = randomise(their_unet(config))
    expected = theirs(latents, timesteps, context).sample
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        del theirs
        gc.collect()
        ours = UNet3D(config).eval()
        file = next(Path(folder).glob("*.safetensors"))
        take(ours, unet_links(config, "diffusers"), open_weights(file))
        return relative(ours(latents, timesteps, context), expected)


def settings() -> Iterator[tuple[str, int, DiffusionConfig, float]]:
    """(sampler, steps, schedule, eta): every setting of the samplers, one after the other and some together."""
    plain: dict[str, Any] = {"timestep_spacing": "leading", "ddim_stride": "constant"}
    kinds: list[dict[str, Any]] = [
        plain, {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}, {"steps_offset": 0},
        {"set_alpha_to_one": False}, {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 0.5},
        {"thresholding": True}, {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
        {"prediction_type": "v"}, {"prediction_type": "x0"}, {"beta_schedule": "linear"}, {"beta_schedule": "cosine"},
        {"prediction_type": "v", "zero_terminal_snr": True, "timestep_spacing": "trailing"},
        {"prediction_type": "x0", "zero_terminal_snr": True, "noise_shift": 5.0, "beta_schedule": "cosine",
         "timestep_spacing": "trailing", "clip_sample": True},
    ]  # fmt: skip
    for kind in kinds:
        config = DiffusionConfig(**{**plain, **kind})
        for steps in (1, 7, 30, 50):
            yield "ddim", steps, config, 0.0
            yield "ddpm", steps, config, 0.0
        # At eta 1 and zero SNR diffusers takes the root of a rounding error below 0, and returns nan.
        yield "ddim", 50, config, 0.9 if config.zero_terminal_snr else 1.0
        yield "ddim", 30, config, 0.5


def rows(*, full: bool, original: Path | None) -> Iterator[Row]:
    """The whole table."""
    for name, config, shapes in (("small", SMALL, SHAPES), ("mid-size", MID, SHAPES[1:3])):
        errors = [unet_errors(config, shape, seed=i) for i, shape in enumerate(shapes)]
        count = sum(p.numel() for p in UNet3D(config).parameters())
        detail = f"{count / 1e6:.1f} M parameters, {len(shapes)} shapes, 1 to 24 frames"
        yield Row(f"UNet, {name}: output", "UNet3DConditionModel", max(e[0] for e in errors), 1e-5, detail)
        yield Row(f"UNet, {name}: gradients", "UNet3DConditionModel", max(e[1] for e in errors), GRADIENTS, detail)
    for name, vae in (("small", SMALL_VAE), ("Stable Diffusion's", VAEConfig())):
        encoded, decoded = vae_errors(vae)
        yield Row(f"VAE, {name}: encode", "AutoencoderKL", encoded, 1e-5, "moments of 6 frames")
        yield Row(f"VAE, {name}: decode", "AutoencoderKL", decoded, 1e-5, "6 frames")
    for name, text in (("small", SMALL_TEXT), ("ViT-H/14", TextConfig())):
        yield Row(f"text tower, {name}", "CLIPTextModel", text_error(text), 1e-5, f"{text.text_layers - 1} layers")
    for sampler in ("ddim", "ddpm"):
        found = [sampler_error(c, steps, sampler=s, eta=eta) for s, steps, c, eta in settings() if s == sampler]
        against = f"{sampler.upper()}Scheduler"
        yield Row(f"{sampler} loop", against, max(found), 1e-6, f"worst step of {len(found)} settings, float64")
    ends: dict[str, Callable[[Path], float]] = {
        "a random pipeline saved by diffusers": opened_here, "the demo model, exported": opened_there
    }  # fmt: skip
    for name, end in ends.items():
        with tempfile.TemporaryDirectory() as folder:
            yield Row(f"frames: {name}", "TextToVideoSDPipeline", end(Path(folder)), 1e-3, "50 DDIM steps, guidance 9")
    if full:
        yield Row("UNet, a100.yaml: output", "UNet3DConditionModel", full_size_error(), 1e-4, "1411.2 M parameters")
    if original is not None:
        yield from (Row(*row) for row in compare(original))


def command(arguments: Sequence[str]) -> None:
    parser = Parser(prog="parity.py", description=str(__doc__).split("\n")[0])
    parser.flag("--full", action="store_true", help="the full-size UNet too")
    parser.flag("--original", type=Path, metavar="DIR", help="modelscope's own folder video_synthesis")
    parser.flag("--device", choices=("cpu",), default="cpu", help="it is of the CPU")
    parser.flag("--json", type=Path, metavar="FILE", help="save the table")
    options: argparse.Namespace = parser.parse_args(arguments)
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install -e '.[parity]'") from error
    table = []
    print("| what | against | largest error | bound | |\n|---|---|---|---|---|")
    for row in rows(full=options.full, original=options.original):
        print(f"| {row.what} | {row.against} | {row.error:.1e} | {row.bound:.0e} | {row.detail} |", flush=True)
        table.append(row._asdict())
    if options.json is not None:
        versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
        write_json(options.json, {**environment(torch.device("cpu")), **versions, "rows": table})
    if late := [row["what"] for row in table if not row["error"] <= row["bound"]]:
        raise FloatingPointError(f"above the bound: {', '.join(late)}")


if __name__ == "__main__":
    raise SystemExit(run(command))
