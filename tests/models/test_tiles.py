"""Decoding in pieces: of frames, which changes nothing, and of squares, which changes little."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VAE, close, randn, vae
from torch import Tensor, nn

from vdm.errors import UserError
from vdm.models import vae as vae_module
from vdm.models.tiles import _spans, decode_tiles


class Enlarge(nn.Module):
    """A decoder that looks at nothing around a latent."""

    def forward(self, z: Tensor) -> Tensor:
        return z[:, :3].repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)


@given(st.integers(1, 60), st.integers(8, 30))
def test_tiles_cover_all_and_overlap(length: int, tile: int) -> None:
    spans = list(_spans(length, tile))
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(end - start == min(tile, length) for start, end in spans)
    assert all(after < end for (_, end), (after, _) in zip(spans, spans[1:], strict=False))


@settings(max_examples=20)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 30), st.integers(1, 30), st.integers(8, 12))
def test_blending_is_seamless(B: int, T: int, h: int, w: int, tile: int) -> None:
    z, decoder = randn(B, 4, T, h, w), Enlarge()
    torch.testing.assert_close(decode_tiles(decoder, tile, 2, z), decoder(z), rtol=0.0, atol=1e-6)


def test_neighbouring_squares_fade_into_each_other() -> None:
    number = itertools.count()

    def flat(z: Tensor) -> Tensor:
        return torch.full((1, 3, 1, 2 * z.shape[3], 2 * z.shape[4]), float(next(number)))

    row = decode_tiles(flat, 8, 2, torch.zeros(1, 4, 1, 8, 14))[0, 0, 0, 0]  # of latents 0 to 8 and 6 to 14
    assert row.tolist() == pytest.approx([0.0] * 12 + [0.125, 0.375, 0.625, 0.875] + [1.0] * 12)


@settings(max_examples=10)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 40))
def test_frames_a_few_at_a_time_are_the_same(B: int, T: int, pixels: int) -> None:
    network, z = vae(), randn(B, 2, T, 3, 2)
    video = randn(B, 3, T, 3 * VAE.factor, 2 * VAE.factor)
    whole, moments = network.decode(z).detach(), network.encode(video).moments.detach()  # with gradients: all at once
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(vae_module, "PIXELS", pixels)
        close(network.decode(z), whole)
        close(network.encode(video).moments, moments)


def test_memory_is_that_of_a_few_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    network, seen = vae(), []
    network.decoder.register_forward_hook(lambda _, given, out: seen.append(given[0].shape))
    monkeypatch.setattr(vae_module, "PIXELS", 2 * VAE.factor**2 * 9 * 9)
    with torch.no_grad():
        network.decode(randn(1, 2, 5, 9, 9))
        network.decode(randn(1, 2, 5, 20, 9), tile=9)
    assert {shape[0] * shape[2] for shape in seen} <= {1, 2} and max(shape[3] for shape in seen) == 9
    sizes = []
    network.encoder.register_forward_hook(lambda _, given, out: sizes.append(given[0].shape[0]))
    with torch.no_grad():
        network.encode(randn(1, 3, 5, 9 * VAE.factor, 9 * VAE.factor))
    assert sizes == [2, 2, 1]


def test_a_tile_as_large_as_the_frame_is_the_frame() -> None:
    network, z = vae(), randn(1, 2, 2, 8, 8)
    close(network.decode(z, tile=8), network.decode(z))
    close(network.decode(z, tile=50), network.decode(z))
    far = network.decode(torch.cat([z, z], dim=4), tile=8)
    assert far.shape[4] == 16 * VAE.factor and far.isfinite().all()


def test_a_tile_too_small_is_named() -> None:
    with pytest.raises(UserError, match="tile must be at least 8 latents, got 7"):
        vae().decode(randn(1, 2, 1, 9, 9), tile=7)
