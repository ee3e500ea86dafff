"""VideoVAE: Stable Diffusion's numbers frame by frame, its distribution, its scale, and time in its decoder."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VAE, close, copies, differ, randn, randomise
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import oracles
from vdm.errors import UserError
from vdm.interop.names import vae_links
from vdm.models import VAEConfig, VideoVAE
from vdm.models.vae import AttentionBlock2D, LatentDistribution, ResBlock2D

TEMPORAL = replace(VAE, temporal_decoder=True)


def video(B: int = 2, T: int = 3, H: int = 4, W: int = 6, *, seed: int = 0) -> Tensor:
    return randn(B, 3, T, H, W, seed=seed).clamp(-1, 1)


def latents(B: int = 2, T: int = 3, h: int = 2, w: int = 3, *, seed: int = 0) -> Tensor:
    return randn(B, VAE.latent_channels, T, h, w, seed=seed)


# Stable Diffusion's structure


def test_the_default_has_the_parameters_of_stable_diffusion() -> None:
    with torch.device("meta"):
        network = VideoVAE()
    assert sum(parameter.numel() for parameter in network.parameters()) == 83_653_863
    assert network.config.factor == 8


@pytest.mark.parity
@pytest.mark.parametrize("config", [VAE, replace(VAE, vae_channels=(4, 6, 8), layers_per_block=2, latent_channels=4)])
def test_moments_and_frames_are_those_of_diffusers(config: VAEConfig) -> None:
    theirs = randomise(oracles.their_vae(config))
    ours = VideoVAE(config).double().eval()
    oracles.take(ours, vae_links(config, "diffusers"), theirs.state_dict())
    x = video(2, 3, 8, 20)
    with torch.inference_mode():
        moments = ours.encode(x).moments
        frames = theirs.encode(x.transpose(1, 2).flatten(0, 1)).latent_dist
        close(moments, frames.parameters.unflatten(0, (2, 3)).transpose(1, 2), tolerance=1e-10)
        z = randn(2, config.latent_channels, 3, 2, 5)
        expected = theirs.decode(z.transpose(1, 2).flatten(0, 1)).sample
        close(ours.decode(z * config.scaling_factor), expected.unflatten(0, (2, 3)).transpose(1, 2), tolerance=1e-10)


# Shapes


@st.composite
def configs(draw: st.DrawFn) -> VAEConfig:
    return VAEConfig(
        image_channels=draw(st.integers(1, 4)),
        latent_channels=draw(st.integers(1, 5)),
        vae_channels=tuple(draw(st.lists(st.sampled_from([2, 4, 6]), min_size=1, max_size=4))),
        layers_per_block=draw(st.integers(1, 2)),
        vae_norm_num_groups=draw(st.sampled_from([1, 2])),
        temporal_decoder=draw(st.booleans()),
    )


@settings(max_examples=15)
@given(configs(), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_any_size_divisible_by_the_factor_goes_both_ways(config: VAEConfig, B: int, T: int, h: int, w: int) -> None:
    network, factor = VideoVAE(config).eval(), config.factor
    assert factor == 2 ** (len(config.vae_channels) - 1)
    x = torch.randn(B, config.image_channels, T, factor * h, factor * w)
    with torch.inference_mode():
        z = network.encode(x).sample()
        assert z.shape == network.encode(x).mode().shape == (B, config.latent_channels, T, h, w)
        y = network.decode(z)
    assert y.shape == x.shape and y.isfinite().all()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_have_the_dtype_of_the_input(weights: torch.dtype, dtype: torch.dtype) -> None:
    network = VideoVAE(VAE).to(weights)
    z = network.encode(video().to(dtype)).sample()
    assert z.dtype == network.decode(z).dtype == dtype


V, Z = video(), latents()


@pytest.mark.parametrize("bad", [V[0], V[:, :2], V[:, :, :0], V[..., :0]])
def test_a_video_of_wrong_shape_is_named(bad: Tensor) -> None:
    with pytest.raises(UserError, match=r"^video must be \(B, 3, T, H, W\), got"):
        tiny.vae().encode(bad)


@pytest.mark.parametrize("bad", [V[..., :5], V[..., :3, :]])
def test_a_size_not_divisible_by_the_factor_is_named(bad: Tensor) -> None:
    with pytest.raises(UserError, match="^height and width must be divisible by 2, got"):
        tiny.vae().encode(bad)


@pytest.mark.parametrize("bad", [Z[0], Z[:, :1], Z[:, :, :0]])
def test_latents_of_wrong_shape_are_named(bad: Tensor) -> None:
    with pytest.raises(UserError, match=r"^latents must be \(B, 2, T, h, w\), got"):
        tiny.vae().decode(bad)


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    *[({key: 0}, f"vae.{key}") for key in ("image_channels", "latent_channels", "layers_per_block")],
    ({"vae_norm_num_groups": 0}, "vae.vae_norm_num_groups"),
    ({"vae_norm_num_groups": 48}, "divisible by vae.vae_norm_num_groups=48"),
    ({"vae_channels": ()}, "vae.vae_channels"),
    ({"vae_channels": (0, 32)}, "vae.vae_channels"),
    ({"scaling_factor": 0.0}, "vae.scaling_factor"),
]


@pytest.mark.parametrize("changes, message", BAD_FIELDS)
def test_impossible_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(VAEConfig(), **changes)


# The distribution and the scale


def distribution(scale: float = 0.5) -> LatentDistribution:
    return LatentDistribution(randn(2, 6, 4, 3, 2), scale)


def test_mode_and_sample_are_those_of_a_scaled_gaussian() -> None:
    latent = distribution(0.5)
    gaussian = Normal(latent.moments[:, :3], (0.5 * latent.moments[:, 3:]).exp())
    close(latent.mode(), 0.5 * gaussian.mean)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([latent.sample(generator) for _ in range(4000)])
    error = (draws.mean(0) - 0.5 * gaussian.mean) / (0.5 * gaussian.stddev / math.sqrt(4000))
    assert error.abs().max() < 5
    ratio = draws.var(0) / (0.25 * gaussian.variance)
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 / 4000)


def test_kl_is_that_of_torch_distributions_per_element() -> None:
    latent = distribution()
    gaussian = Normal(latent.moments[:, :3], (0.5 * latent.moments[:, 3:]).exp())
    unit = Normal(torch.zeros_like(gaussian.mean), torch.ones_like(gaussian.mean))
    close(latent.kl(), kl_divergence(gaussian, unit).flatten(1).mean(1))
    assert latent.kl().shape == (2,)


def test_log_variance_is_clamped() -> None:
    latent = LatentDistribution(torch.tensor([0.0, 0.0, -1e6, 1e6]).reshape(1, 4, 1, 1, 1), 1.0)
    assert latent.logvar.flatten().tolist() == [-30.0, 20.0]
    assert latent.sample().isfinite().all() and latent.kl().isfinite().all()


def test_a_clip_is_drawn_from_its_own_generator_whatever_the_batch() -> None:
    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    moments = distribution().moments
    both = LatentDistribution(moments, 1.0).sample([generator(7), generator(8)])
    for i, seed in enumerate((7, 8)):
        alone = LatentDistribution(moments[i : i + 1], 1.0).sample([generator(seed)])
        assert torch.equal(both[i : i + 1], alone)
    same = LatentDistribution(moments[:1].repeat(2, 1, 1, 1, 1), 1.0).sample([generator(7), generator(7)])
    assert torch.equal(same[0], same[1]) and torch.equal(same[:1], both[:1])


def test_one_generator_repeats_its_draw_and_none_does_not() -> None:
    latent = distribution()
    first, again = (latent.sample(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert differ(latent.sample(), latent.sample())


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_generators_is_named(count: int) -> None:
    with pytest.raises(UserError, match=f"got {count} generators for 2 "):
        distribution().sample([torch.Generator() for _ in range(count)])


@settings(max_examples=5)
@given(st.floats(0.01, 10))
def test_the_scale_is_applied_once_each_way(scale: float) -> None:
    ours, plain = tiny.vae(replace(VAE, scaling_factor=scale)), tiny.vae(replace(VAE, scaling_factor=1.0))
    with torch.inference_mode():
        z, unscaled = ours.encode(video()), plain.encode(video())
        close(z.mode(), scale * unscaled.mode())
        draws = [latent.sample(torch.Generator().manual_seed(0)) for latent in (z, unscaled)]
        close(draws[0], scale * draws[1])
        close(ours.decode(z.mode()), plain.decode(unscaled.mode()))


# What may influence what


@pytest.mark.parametrize("config", [VAE, TEMPORAL])
@settings(max_examples=4)
@given(B=st.integers(2, 3), T=st.integers(1, 3), h=st.integers(1, 3), w=st.integers(1, 3))
def test_a_clip_does_not_depend_on_its_neighbours(config: VAEConfig, B: int, T: int, h: int, w: int) -> None:
    network, x, z = tiny.vae(config), video(B, T, 2 * h, 2 * w), latents(B, T, h, w)
    with torch.inference_mode():
        moments, frames = network.encode(x).moments, network.decode(z)
        for i in range(B):
            close(moments[i : i + 1], network.encode(x[i : i + 1]).moments)
            close(frames[i : i + 1], network.decode(z[i : i + 1]))
        x[1:], z[1:] = float("nan"), float("nan")
        close(network.encode(x).moments[:1], moments[:1])
        close(network.decode(z)[:1], frames[:1])


@settings(max_examples=5)
@given(st.permutations(range(4)))
def test_without_temporal_layers_frames_go_in_any_order(order: list[int]) -> None:
    network, x, z = tiny.vae(), video(T=4), latents(T=4)
    with torch.inference_mode():
        close(network.encode(x[:, :, order]).moments, network.encode(x).moments[:, :, order])
        close(network.decode(z[:, :, order]), network.decode(z)[:, :, order])


def test_trained_temporal_layers_make_frames_matter_to_each_other() -> None:
    network, x, z = tiny.vae(TEMPORAL), video(T=4), latents(T=4)
    order = [2, 0, 3, 1]
    with torch.inference_mode():
        assert differ(network.decode(z[:, :, order]), network.decode(z)[:, :, order])
        close(network.encode(x[:, :, order]).moments, network.encode(x).moments[:, :, order])


def test_untrained_temporal_layers_leave_an_image_vae_as_it_was() -> None:
    with_time, image = VideoVAE(TEMPORAL).double().eval(), tiny.vae()
    missing, unexpected = with_time.load_state_dict(image.state_dict(), strict=False)
    assert not unexpected and missing and all(name.startswith("decoder.time.") for name in missing)
    z = latents()
    with torch.inference_mode():
        close(with_time.decode(z), image.decode(z))
        frames = [image.decode(frame.unsqueeze(2)) for frame in z.unbind(2)]
        close(image.decode(z), torch.cat(frames, dim=2))


@pytest.mark.parametrize("out_channels", [4, 6])
def test_untrained_blocks_of_a_frame_are_linear(out_channels: int) -> None:
    res, attention = ResBlock2D(4, out_channels, groups=2), AttentionBlock2D(4, groups=2)
    x = torch.randn(2, 4, 3, 5)
    assert torch.equal(res(x), res.shortcut(x)) and torch.equal(attention(x), x)


def test_untrained_convolutions_are_orthogonal() -> None:
    for layer in (layer for layer in VideoVAE(VAE).modules() if type(layer) is nn.Conv2d and layer.weight.any()):
        rows = layer.weight.flatten(1) if layer.weight[0].numel() >= len(layer.weight) else layer.weight.flatten(1).T
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)
        assert layer.bias is not None and not layer.bias.any()


@pytest.mark.parametrize("config", [VAE, TEMPORAL])
def test_gradients_reach_every_parameter(config: VAEConfig) -> None:
    network, x = tiny.vae(config), video()
    latent = network.encode(x)
    (network.decode(latent.sample(torch.Generator().manual_seed(0))) * randn(*x.shape, seed=4)).sum().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]
    assert not silent


def test_coding_copies_no_activation() -> None:
    """But for padding before a strided convolution, and the phases of the one upsampling, which are interleaved."""
    network = VideoVAE(replace(VAE, vae_channels=(8, 8))).eval()
    x, z = (torch.randn(2, c, 2, 16, 16).contiguous(memory_format=torch.channels_last_3d) for c in (3, 2))
    calls = ((lambda: network.encode(x), 8 * 2 * 2 * 64, 0), (lambda: network.decode(z), 8 * 2 * 2 * 256, 1))
    for run, numel, interleaved in calls:
        found = [stack for stack in copies(run, numel=numel) if "aten::pad" not in stack]
        assert len(found) == interleaved, found


def test_a_video_in_default_memory_is_copied_once_at_the_door() -> None:
    network, x = VideoVAE(replace(VAE, vae_channels=(2, 2))).eval(), torch.randn(2, 3, 2, 16, 16)
    assert len(copies(lambda: network.encode(x), numel=x.numel())) == 1
