"""Does it learn at all? Four clips by heart, and back from pure noise, each for its own caption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vdm.config import Config, load
from vdm.data.dataset import ClipDataset
from vdm.pipeline import TextToVideo
from vdm.training.loop import train

TINY = Path(__file__).parents[1] / "fixtures" / "tiny.yaml"

BOTH = (
    "data.num_clips=4", "training.batch_size=4", "data.height=32", "data.width=32", "sampling.height=32",
    "sampling.width=32", "vae_channels=[16, 16, 16]", "learning_rate=4e-3", "warmup_steps=10", "weight_decay=0",
    "ema_decay=0.95", "checkpointing_steps=1000", "validation_steps=0",
)  # fmt: skip
AUTOENCODER = (*BOTH, "training.task=vae", "max_train_steps=180")
DIFFUSION = (  # the recipe of configs/demo.yaml
    *BOTH, "max_train_steps=160", "prediction_type=x0", "zero_terminal_snr=true", "loss_weighting=velocity",
    "beta_schedule=cosine", "noise_shift=3", "temporal_dropout=0", "caption_dropout=0", "data.cache_latents=true",
)  # fmt: skip


def psnr(clip: Tensor, other: Tensor) -> float:
    """In dB, of pixels in [0,1]."""
    return float(-10 * torch.log10((clip - other).square().mean()))


def the_clips(config: Config) -> tuple[list[str], Tensor]:
    """Captions, and pixels (4,T,3,H,W) in [0,1], of the whole training set."""
    clips = ClipDataset(config.data, split="train", seed=config.seed, batch_size=4)
    samples = sorted((clips[position] for position in range(4)), key=lambda sample: sample["index"])
    assert len({sample["index"] for sample in samples}) == 4
    return [s["caption"] for s in samples], torch.stack([s["video"].transpose(0, 1) / 255 for s in samples])


@pytest.mark.slow
def test_four_clips_are_recovered_from_noise_by_ddim_50(tmp_path: Path) -> None:
    """Against the clips' own pixels, so the autoencoder's error counts too.

    Every clip must be nearest to its own caption's, by far: one clip that is repeated four times is not.
    """
    vae = train(load(TINY, [*AUTOENCODER, f"run_dir={tmp_path / 'vae'}"]))
    config = load(TINY, [*DIFFUSION, f"vae_weights={vae}", f"run_dir={tmp_path / 'unet'}"])
    pipe = TextToVideo.from_pretrained(train(config))
    captions, clips = the_clips(config)
    noise = [torch.Generator().manual_seed(100 + i) for i in range(4)]
    made = pipe(captions, generator=noise, num_inference_steps=50, guidance_scale=1.0, output_type="pt").frames
    assert isinstance(made, Tensor)
    table = [[psnr(mine, theirs) for theirs in clips] for mine in made]
    for i, row in enumerate(table):
        assert row[i] > 20.0, table
        assert all(row[i] > other + 3.0 for j, other in enumerate(row) if j != i), table
        assert row[i] > psnr(clips.mean(0), clips[i]) + 2.0, "the mean of all clips is a cheap guess"

    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(clips.transpose(1, 2) * 2 - 1).mode()).transpose(1, 2)
    best = ((decoded + 1) / 2).clamp(0, 1)  # all that the latents can say
    assert all(psnr(mine, theirs) > 25.0 for mine, theirs in zip(made, best, strict=True))
