"""Clips to features for FVD: pixels, repeats, names, and that neither the batch nor the process around changes them."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vdm.errors import UserError
from vdm.metrics.fvd import Check, FVDProtocol, i3d_features, repeats, selftest
from vdm.metrics.i3d import I3D
from vdm.metrics.resize import resize


class Short(I3D):
    """An I3D whose convolutions are a mean and a few fixed products, for they take seconds; all the rest is I3D's."""

    def maps(self, video: Tensor) -> Tensor:
        steps = -(-video.shape[2] // 8)
        means = F.adaptive_avg_pool3d(video, (steps, 7, 7))
        weights = torch.linspace(-1, 1, 3 * 1024, device=video.device).reshape(1024, 3).cos()
        return torch.einsum("bcthw,kc->bkthw", means, weights)


@pytest.fixture(scope="module")
def net() -> Short:
    torch.manual_seed(0)
    return Short()


def clips(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_pixels_are_what_the_network_takes(net: Short) -> None:
    batch = clips(2, 9, 224, 224, 3)
    video = (batch.double() / 255 * 2 - 1).permute(0, 4, 1, 2, 3).float()
    torch.testing.assert_close(i3d_features(batch, net), net(video), atol=1e-6, rtol=1e-5)
    pooled = i3d_features(batch, net, protocol=FVDProtocol(layer="pool1024"))
    torch.testing.assert_close(pooled, net.features(video, layer="pool1024"), atol=1e-6, rtol=1e-5)


def test_each_way_of_resizing_is_done(net: Short) -> None:
    batch = clips(1, 9, 31, 50, 3)
    seen = []
    for fit in ("squash", "crop"):
        for interp in ("torch", "tf1", "aa"):
            protocol = FVDProtocol(resize=fit, interp=interp)
            video = (resize(batch, 224, fit=fit, interp=interp) / 127.5 - 1).transpose(1, 2)
            found = i3d_features(batch, net, protocol=protocol)
            torch.testing.assert_close(found, net(video), atol=1e-6, rtol=1e-5)
            seen.append(found)
    # Where nothing shrinks, "aa" is "torch"; all others differ.
    assert len({tuple(features[0].tolist()) for features in seen}) >= 4


def test_neither_the_batch_nor_its_order_matters(net: Short) -> None:
    batch = clips(7, 10, 20, 30, 3)
    before = batch.clone()
    whole = i3d_features(batch, net)
    assert whole.shape == (7, 400) and whole.dtype == torch.float32
    assert torch.equal(whole, torch.cat([i3d_features(clip[None], net) for clip in batch]))
    assert torch.equal(whole.flip(0), i3d_features(batch.flip(0), net))
    assert torch.equal(whole, i3d_features(batch.numpy(), net)), "the second time, of an array"
    assert torch.equal(batch, before)
    assert i3d_features(batch[:0], net).shape == (0, 400)


def test_nothing_around_it_lowers_the_precision(net: Short) -> None:
    batch = clips(1, 9, 24, 24, 3)
    expected = i3d_features(batch, net)
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        assert net(torch.zeros(1, 3, 9, 224, 224)).dtype == torch.bfloat16, "by itself the network would obey"
        found = i3d_features(batch, net)
    assert torch.equal(found, expected) and not found.requires_grad
    assert flags == (
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    ), "and what the process had set is as it was"  # fmt: skip


# Short clips


def test_how_often_frames_are_shown() -> None:
    assert [repeats(frames) for frames in (5, 8, 9, 16, 128)] == [2, 2, 1, 1, 1]
    for frames in (1, 4):
        with pytest.raises(UserError, match=f"9 frames, or 5 shown twice, not {frames}"):
            repeats(frames)


def test_short_clips_are_repeated_only_where_that_is_asked_for(net: Short) -> None:
    batch = clips(1, 8, 24, 24, 3)
    with pytest.raises(UserError, match="8 frames needs repeat=2, not 1"):
        i3d_features(batch, net)
    with pytest.raises(UserError, match="16 frames needs repeat=1, not 2"):
        i3d_features(clips(1, 16, 24, 24, 3), net, protocol=FVDProtocol(repeat=2))
    with pytest.raises(UserError, match="make longer ones"):
        i3d_features(batch[:, :4], net, protocol=FVDProtocol(repeat=2))
    shown = batch[:, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]]
    twice = i3d_features(batch, net, protocol=FVDProtocol(repeat=2))
    assert torch.equal(twice, i3d_features(shown, net))


# Names and refusals


def test_names() -> None:
    assert FVDProtocol().name("fvd") == "fvd"
    assert FVDProtocol(interp="tf1", resize="crop", bn_eps=1e-5).name("fvd") == "fvd"
    assert FVDProtocol(repeat=2).name("fvd") == "fvd_rep2"
    assert FVDProtocol(layer="pool1024").name("fvd_i3d_imagenet") == "fvd_i3d_imagenet_pool1024"
    assert FVDProtocol(layer="pool1024", repeat=2).name("kvd") == "kvd_pool1024_rep2"


def test_a_protocol_is_a_record() -> None:
    record = json.loads(json.dumps(asdict(FVDProtocol())))
    assert record == {"resize": "squash", "interp": "torch", "layer": "logits400", "bn_eps": 0.001, "repeat": 1}
    assert FVDProtocol(**record) == FVDProtocol()


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("resize", "pad", "squash, crop"),
        ("interp", "bicubic", "torch, tf1, aa"),
        ("layer", "pool", "logits400, pool1024"),
        ("bn_eps", 1e-4, "0.001, 1e-05"),
        ("repeat", 3, "1, 2"),
    ],
)
def test_unknown_choices_are_refused(name: str, value: object, choices: str) -> None:
    with pytest.raises(UserError, match=f"FVD's {name} is .*; it must be one of {choices}"):
        replace(FVDProtocol(), **{name: value})


def test_what_is_no_batch_of_clips_is_refused(net: Short) -> None:
    with pytest.raises(ValueError, match="clips are uint8"):
        i3d_features(clips(9, 24, 24, 3), net)
    with pytest.raises(ValueError, match="frames are uint8"):
        i3d_features(torch.zeros(1, 9, 24, 24, 3, dtype=torch.bfloat16), net)
    with pytest.raises(ValueError, match="bn_eps is 0.001, the protocol's 1e-05"):
        i3d_features(clips(1, 9, 24, 24, 3), net, protocol=FVDProtocol(bn_eps=1e-5))


def test_features_that_are_no_numbers_are_refused() -> None:
    broken = Short()
    broken.logits.conv3d.weight[7] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        i3d_features(clips(1, 9, 24, 24, 3), broken)


# The golden numbers


def scaled(net: I3D, *, to: float) -> list[Check]:
    """The self-test after the last layer was scaled so that its first number is `to`."""
    net.logits.conv3d.weight.mul_((to / selftest(net)[0].found) ** 0.5)
    return selftest(net)


def test_the_selftest_tells_right_weights_from_wrong(net: Short) -> None:
    assert not any(check.ok for check in selftest(net)), "random weights"
    copied = copy.deepcopy(net)
    checks = scaled(copied, to=152.1)
    assert [(check.name, check.expected) for check in checks] == [
        ("black to white clips of 16 frames", 152.92),
        ("black to white clips of 30 frames", 151.26),
    ]
    assert [check.found for check in checks] == pytest.approx([152.1, 152.1], abs=1e-3)
    assert [check.ok for check in checks] == [True, True]
    copied.logits.conv3d.weight.mul_((152.5 / 152.1) ** 0.5)
    assert [check.ok for check in selftest(copied)] == [True, False]
    with pytest.raises(ValueError, match="bn_eps"):
        selftest(Short(bn_eps=1e-5))


@pytest.mark.slow
def test_the_whole_network() -> None:
    torch.manual_seed(1)
    whole = I3D()
    batch = clips(3, 9, 40, 40, 3)
    together = i3d_features(batch, whole)
    assert together.shape == (3, 400)
    video = (resize(batch, 224) / 127.5 - 1).transpose(1, 2)
    torch.testing.assert_close(together, whole(video), atol=1e-5, rtol=1e-5)
