"""What CLIP sees of a frame, against open_clip's own preprocessing and VBench's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from vdm.metrics.clip_pixels import OPENAI_MEAN, OPENAI_STD, clip_pixels, short_side, torch_bicubic

OPEN_CLIP_NAMES = {"crop": "shortest", "squash": "squash", "pad": "longest"}


def frames(height: int, width: int, *, num: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (1, num, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (240, 427), (101, 67), (64, 65), (224, 224), (225, 300)])
def test_equals_open_clip_to_the_bit(fit: str, height: int, width: int) -> None:
    clips = frames(height, width)
    transform = image_transform_v2(PreprocessCfg(size=224, resize_mode=OPEN_CLIP_NAMES[fit]), is_train=False)
    wanted = torch.stack([transform(Image.fromarray(frame.numpy())) for frame in clips[0]])
    assert torch.equal(clip_pixels(clips, size=224, fit=fit)[0], wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (240, 427), (101, 67)])
def test_without_antialiasing_it_is_vbenchs(height: int, width: int) -> None:
    clips = frames(height, width)
    resize = Resize(32, interpolation=InterpolationMode.BICUBIC, antialias=False)
    whole = Compose([resize, CenterCrop(32), lambda x: x.float().div(255), Normalize(OPENAI_MEAN, OPENAI_STD)])
    wanted = whole(clips[0].permute(0, 3, 1, 2))
    got = clip_pixels(clips, size=32, antialias=False)[0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert (got - clip_pixels(clips, size=32)[0]).abs().mean() > 0.1, "it is another picture than the antialiased one"


def test_what_is_kept_of_a_wide_frame() -> None:
    clips = torch.zeros(1, 1, 8, 16, 3, dtype=torch.uint8)
    clips[:, :, :, :3] = 255  # a white stripe at the left side
    black, white = ((value - OPENAI_MEAN[0]) / OPENAI_STD[0] for value in (0.0, 1.0))
    seen = {fit: clip_pixels(clips, size=8, fit=fit)[0, 0, 0] for fit in ("crop", "squash", "pad")}  # type: ignore[arg-type]
    assert torch.allclose(seen["crop"], torch.full((8, 8), black)), "the centre has none of it"
    assert seen["squash"][0, 0] == pytest.approx(white) and seen["pad"][4, 0] == pytest.approx(white)
    assert torch.allclose(seen["pad"][[0, 1, 6, 7]], torch.full((4, 8), black)), "bars above and below"


def test_the_long_side_is_rounded_down_as_torchvisions() -> None:
    for height, width in [(240, 427), (427, 240), (7, 5), (224, 224), (1080, 1920)]:
        size = Resize(224)(Image.new("RGB", (width, height))).size
        assert short_side(height, width, 224) == (size[1], size[0])


def test_any_leading_axes() -> None:
    clips = frames(9, 12).movedim(-1, 2)
    assert torch.equal(torch_bicubic(clips, height=4, width=6)[0, 1], torch_bicubic(clips[0, 1], height=4, width=6))


@pytest.mark.parametrize(
    "bad", [torch.rand(1, 2, 8, 8, 3), frames(8, 8)[0], frames(8, 8).movedim(-1, 2), frames(8, 8, num=0)]
)
def test_other_clips_are_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(B, T, H, W, 3\)"):
        clip_pixels(bad, size=8)


def test_numpy_and_torch_see_the_same_channels() -> None:
    red = np.zeros((1, 1, 8, 8, 3), dtype=np.uint8)
    red[..., 0] = 255
    seen = clip_pixels(torch.from_numpy(red), size=8)[0, 0].mean((1, 2))
    assert seen[0] > 1.5 and seen[1] < -1 and seen[2] < -1
