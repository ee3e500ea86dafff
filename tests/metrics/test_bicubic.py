"""Our resizing against Pillow's own, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from vdm.metrics.bicubic import pillow_bicubic

side = st.integers(1, 40)


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


def by_pillow(image: Tensor, *, height: int, width: int) -> Tensor:
    """Width first, then height, in two steps, since Pillow 13 chooses the order by the sizes; image (H, W, 3)."""
    wide = Image.fromarray(image.numpy()).resize((width, image.shape[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(wide.resize((width, height), Image.Resampling.BICUBIC)))


@settings(max_examples=50)
@given(height=side, width=side, new_height=side, new_width=side)
def test_equals_pillow_to_the_bit(height: int, width: int, new_height: int, new_width: int) -> None:
    image = noise(height, width, 3)
    ours = pillow_bicubic(image.permute(2, 0, 1), height=new_height, width=new_width).permute(1, 2, 0)
    assert torch.equal(ours, by_pillow(image, height=new_height, width=new_width))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (256, 340), (300, 225), (240, 427)])
def test_equals_pillow_in_one_step_where_the_shape_is_kept(height: int, width: int) -> None:
    image, size = noise(height, width, 3), (224 * width // min(height, width), 224 * height // min(height, width))
    ours = pillow_bicubic(image.permute(2, 0, 1), height=size[1], width=size[0]).permute(1, 2, 0)
    assert np.array_equal(ours.numpy(), Image.fromarray(image.numpy()).resize(size, Image.Resampling.BICUBIC))


def test_frames_are_resized_one_by_one_and_left_as_they_were() -> None:
    frames = noise(2, 3, 3, 20, 30)
    before = frames.clone()
    together = pillow_bicubic(frames, height=7, width=50)
    assert torch.equal(together[1, 2], pillow_bicubic(frames[1, 2], height=7, width=50))
    assert torch.equal(frames, before) and together.dtype == torch.uint8


def test_only_grey_levels_are_taken() -> None:
    with pytest.raises(ValueError, match="uint8"):
        pillow_bicubic(torch.rand(3, 4, 4), height=2, width=2)
