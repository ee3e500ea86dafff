"""Dropout by clip: the masks of a clip are its own, and have the statistics of dropout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vdm.models import UNet3D
from vdm.models.dropout import ClipDropout, clip_mask, clip_seeds, number_layers

SHAPE = (2, 3, 4, 4)


def layer(p: float, *, number: int = 0) -> ClipDropout:
    dropout = ClipDropout(p)
    dropout.number = number
    return dropout


@given(st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=5, unique=True), st.sampled_from([0.1, 0.5, 0.9]))
def test_a_clip_has_the_same_mask_in_any_batch(seeds: list[int], p: float) -> None:
    x = torch.ones(len(seeds), *SHAPE).contiguous(memory_format=torch.channels_last_3d)
    with clip_seeds(seeds):
        together = layer(p)(x)
    for number, seed in enumerate(seeds):
        with clip_seeds([seed]):
            alone = layer(p)(x[:1])
        assert torch.equal(alone[0], together[number])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_share_and_the_scale_are_those_of_dropout(p: float) -> None:
    with clip_seeds([7, 8]):
        y = layer(p)(torch.ones(2, 8, 10, 20, 25))
    assert y.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=1e-5)  # p is drawn as a multiple of 1 / 65536
    assert float(y.mean()) == pytest.approx(1.0, abs=5 * (p / (1 - p) / y.numel()) ** 0.5)
    for clip in y:
        assert float((clip == 0).float().mean()) == pytest.approx(p, abs=5 * (p * (1 - p) / clip.numel()) ** 0.5)
    agree = float(((y[0] == 0) == (y[1] == 0)).float().mean())
    assert agree == pytest.approx(p * p + (1 - p) ** 2, abs=0.02), "two clips are independent"


@pytest.mark.parametrize("p", [1e-9, 0.999999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_are_finite(p: float, dtype: torch.dtype) -> None:
    with clip_seeds([7]):
        y = layer(p)(torch.ones(1, 1, 3, 7, 9, dtype=dtype))
    assert y.dtype == dtype and y.isfinite().all() and bool((y == 0).all()) == (p > 0.5)


def test_layers_are_independent_and_numbered_in_order() -> None:
    x = torch.ones(1, 4, 10, 20, 20)
    with clip_seeds([3]):
        masks = [layer(0.5, number=number)(x) for number in (0, 1)]
    assert float(((masks[0] == 0) == (masks[1] == 0)).float().mean()) == pytest.approx(0.5, abs=0.03)
    model = torch.nn.Sequential(ClipDropout(0.1), torch.nn.ModuleList([ClipDropout(0.1)]), ClipDropout(0.1))
    number_layers(model)
    assert [m.number for m in model.modules() if isinstance(m, ClipDropout)] == [0, 1, 2]


def test_without_seeds_in_evaluation_and_at_zero_it_is_torch_s_own() -> None:
    x = torch.randn(2, *SHAPE)
    torch.manual_seed(0)
    ours = ClipDropout(0.5)(x)
    torch.manual_seed(0)
    assert torch.equal(ours, torch.nn.Dropout(0.5)(x))
    with clip_seeds([1, 2]):
        assert torch.equal(ClipDropout(0.5).eval()(x), x)
        assert torch.equal(ClipDropout(0.0)(x), x)


def test_the_gradient_goes_through_what_is_kept() -> None:
    x = torch.randn(2, *SHAPE, requires_grad=True)
    with clip_seeds([1, 2]):
        y = layer(0.5)(x)
        y.sum().backward()
        mask = clip_mask(x.detach(), 0.5, 0)
    assert x.grad is not None and torch.equal(x.grad, mask)


def test_the_operator_is_well_formed() -> None:
    with clip_seeds([1, 2]):
        torch.library.opcheck(clip_mask, (torch.randn(2, *SHAPE), 0.5, 3))


def test_every_dropout_of_the_unet_has_a_number_of_its_own() -> None:
    with torch.device("meta"):
        layers = [m for m in UNet3D().modules() if isinstance(m, torch.nn.Dropout)]
    assert len(layers) > 100
    assert sorted(m.number for m in layers if isinstance(m, ClipDropout)) == list(range(len(layers)))
