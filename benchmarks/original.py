"""The lines of benchmarks/parity.py against the original's own code, in a folder that the user has cloned.

    git clone https://github.com/modelscope/modelscope
    python benchmarks/parity.py --original modelscope/modelscope/models/multi_modal/video_synthesis

Its code (which needs einops) is imported from there, and opens a folder that `vdm convert --to modelscope` has written.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.oracles import randomise, relative
from vdm.components import build_components
from vdm.config import Config
from vdm.diffusion import NoiseSchedule, ddim_sample
from vdm.errors import UserError
from vdm.interop.convert import convert
from vdm.interop.modelscope import FILES, SAMPLING, SCHEDULE
from vdm.models import UNetConfig
from vdm.pipeline import TextToVideo
from vdm.text.encoder import TextConfig

# As small as the original allows: it has 32 groups, a context of 1024 and Stable Diffusion's autoencoder built in.
CONFIG = Config(
    name="original",
    model=UNetConfig(unet_dim=64, channel_mult=(1, 2, 2), attention_levels=(True, True, False), num_res_blocks=1),
    text=TextConfig(text_width=1024, text_heads=16, text_layers=2),
    diffusion=SCHEDULE,
    sampling=SAMPLING,
)
IMAGE_MODEL = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
Errors = Iterator[tuple[str, str, float, float, str]]


def _import(folder: Path, name: str) -> ModuleType:
    file = folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"original_{name}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--original {folder} has no {name}.py; give modelscope's folder video_synthesis")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def compare(folder: Path) -> Errors:
    """(what, against, error, bound, detail) of each part."""
    pipe = TextToVideo(CONFIG, build_components(CONFIG))
    for i, module in enumerate((pipe.unet, pipe.vae, pipe.text_encoder)):
        randomise(module, i)
    with tempfile.TemporaryDirectory() as place:
        pipe.save_pretrained(Path(place) / "ours")
        theirs = Path(place) / "theirs"
        convert(Path(place) / "ours", theirs, to="modelscope", say=lambda line: None)
        unet = _their_unet(folder, theirs)
        vae = _import(folder, "autoencoder").AutoencoderKL(IMAGE_MODEL, 4, str(theirs / FILES["vae"])).eval()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 3, 8, 12, generator=generator)  # the original wants sizes that halve evenly
    t, context = torch.tensor([981, 1]), torch.randn(2, 77, 1024, generator=generator)
    yield "UNet: output", "UNetSD", relative(pipe.unet(z, t, context), unet(z, t, context)), 1e-5, "loaded strictly"
    frames = lambda x: x.transpose(1, 2).flatten(0, 1)  # noqa: E731
    video = torch.rand(1, 3, 2, 64, 48, generator=generator) * 2 - 1
    error = relative(frames(pipe.vae.encode(video).moments), vae.encode(frames(video)).parameters)
    yield "VAE: encode", "the original's AutoencoderKL", error, 1e-5, "moments of 2 frames"
    error = relative(frames(pipe.vae.decode(z * 0.18215)), vae.decode(frames(z)))
    yield "VAE: decode", "the original's AutoencoderKL", error, 1e-5, "6 frames"
    yield from _loops(folder, pipe, unet)


def _their_unet(folder: Path, weights: Path) -> Any:
    cfg = json.loads((weights / "configuration.json").read_text())["model"]["model_cfg"]
    unet = _import(folder, "unet_sd").UNetSD(
        in_dim=cfg["unet_in_dim"], dim=cfg["unet_dim"], y_dim=cfg["unet_y_dim"], context_dim=cfg["unet_context_dim"],
        out_dim=cfg["unet_out_dim"], dim_mult=cfg["unet_dim_mult"], num_heads=cfg["unet_num_heads"],
        head_dim=cfg["unet_head_dim"], num_res_blocks=cfg["unet_res_blocks"], attn_scales=cfg["unet_attn_scales"],
        dropout=cfg["unet_dropout"], temporal_attention=cfg["temporal_attention"] == "True",
    )  # fmt: skip
    unet.load_state_dict(torch.load(weights / FILES["unet"], weights_only=True), strict=True)
    return unet.eval()


def _loops(folder: Path, pipe: TextToVideo, unet: Any) -> Errors:
    """The sampling loop on any function, in float64 and at any number of steps; and the whole, on the networks."""
    diffusion = _import(folder, "diffusion")
    betas = diffusion.beta_schedule("linear_sd", 1000, 0.00085, 0.012)
    loop = diffusion.GaussianDiffusion(betas=betas, mean_type="eps", var_type="fixed_small", loss_type="mse")

    def network(x: Tensor, t: Tensor, y: float = 0.0) -> Tensor:
        return (1.3 * x + 0.2).sin() + 0.3 * (t.double() / 1000).view(-1, 1, 1, 1, 1) + y

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, 0.1) + 9.0 * (network(x, t, 0.5) - network(x, t, 0.1))

    counts, worst = (50, 20, 30, 7, 600), 0.0
    start = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for steps in counts:
        expected = loop.ddim_sample_loop(
            start, network, [{"y": 0.5}, {"y": 0.1}], guide_scale=9.0, ddim_timesteps=steps
        )
        worst = max(worst, relative(ddim_sample(guided, start, NoiseSchedule(SCHEDULE), num_steps=steps), expected))
    yield "sampling loop", "GaussianDiffusion", worst, 1e-9, f"{', '.join(map(str, counts))} steps, float64"
    noise = torch.randn(1, 4, 3, 8, 12, generator=torch.Generator().manual_seed(2))
    empty, prompt = pipe.text_encoder(["", "a red cup"]).split(1)
    contexts = [{"y": prompt}, {"y": empty}]
    expected = loop.ddim_sample_loop(noise, unet, contexts, guide_scale=9.0, ddim_timesteps=50)
    found = pipe("a red cup", latents=noise, output_type="latent").frames
    yield "latents, end to end", "the original's loop and UNet", relative(found, expected), 1e-3, "50 steps, guidance 9"
