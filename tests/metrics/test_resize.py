"""Resizing against figures worked out by hand, PIL, OpenCV and numpy's own interpolation."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from vdm.metrics.resize import Fit, Interp, resize


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def row_of(values: list[int], size: int, interp: Interp) -> list[float]:
    """One picture that changes across and not down, resized; its first row."""
    frame = torch.tensor(values, dtype=torch.uint8)[None, :, None].expand(len(values), -1, 3)
    return resize(frame, size, interp=interp)[0, 0].tolist()


@pytest.mark.parametrize(
    ("values", "size", "interp", "expected"),
    [
        ([0, 1, 2, 3], 8, "tf1", [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]),
        ([0, 1, 2, 3], 8, "torch", [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]),
        ([0, 1, 2, 3, 4, 5, 6, 7], 3, "torch", [0.8333, 3.5, 6.1667]),
        ([0, 1, 2, 3, 4, 5, 6, 7], 3, "aa", [1.1053, 3.5, 5.8947]),
        ([0, 1, 2, 3, 4, 5, 6, 7], 3, "tf1", [0, 2.6667, 5.3333]),
    ],
)
def test_reference_values(values: list[int], size: int, interp: Interp, expected: list[float]) -> None:
    assert row_of(values, size, interp) == pytest.approx(expected, abs=1e-4)


def test_down_and_across_are_not_mixed_up() -> None:
    frame = noise(11, 23, 3)
    for interp in ("torch", "tf1", "aa"):
        turned = resize(frame.transpose(0, 1), 7, interp=interp)
        torch.testing.assert_close(turned, resize(frame, 7, interp=interp).mT, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width", "size"), [(40, 61, 24), (13, 9, 24), (256, 256, 224)])
def test_against_other_programs(height: int, width: int, size: int) -> None:
    frame = noise(height, width, 3, seed=1)
    channel = frame.numpy()[:, :, 1].astype(np.float32)

    by_opencv = cv2.resize(channel, (size, size), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(resize(frame, size)[1], by_opencv, atol=1e-2)

    by_pil = np.asarray(Image.fromarray(channel, mode="F").resize((size, size), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(resize(frame, size, interp="aa")[1], by_pil, atol=1e-2)

    wanted = channel.astype(np.float64)
    for axis, length in enumerate((height, width)):
        places = np.arange(size) * length / size
        wanted = np.apply_along_axis(lambda line, x=places: np.interp(x, np.arange(len(line)), line), axis, wanted)
    np.testing.assert_allclose(resize(frame, size, interp="tf1")[1], wanted, atol=1e-2)


def test_frames_one_by_one_are_what_a_video_resizer_makes_of_all() -> None:
    clip = noise(5, 40, 61, 3)
    video = clip.movedim(-1, 0).float()[None]
    whole = torch.nn.functional.interpolate(video, size=(5, 24, 24), mode="trilinear")
    torch.testing.assert_close(resize(clip, 24).movedim(1, 0), whole[0], atol=255 * 1.2e-7 * 4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(20, 50), (50, 20), (33, 34), (20, 20)])
def test_crop_is_the_middle_of_the_whole(height: int, width: int) -> None:
    frame = noise(height, width, 3, seed=2)
    scale = 16 / min(height, width)
    across, down = int(np.ceil(width * scale)), int(np.ceil(height * scale))
    whole = cv2.resize(frame.numpy().astype(np.float32), (across, down), interpolation=cv2.INTER_LINEAR)
    left, top = (across - 16) // 2, (down - 16) // 2
    middle = whole[top : top + 16, left : left + 16].transpose(2, 0, 1)
    np.testing.assert_allclose(resize(frame, 16, fit="crop"), middle, atol=1e-2)


@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    size=st.integers(1, 30),
    fit=st.sampled_from(["squash", "crop"]),
    interp=st.sampled_from(["torch", "tf1", "aa"]),
)
def test_properties(height: int, width: int, size: int, fit: Fit, interp: Interp) -> None:
    clips = noise(2, 3, height, width, 3, seed=height * 31 + width)
    before = clips.clone()
    out = resize(clips, size, fit=fit, interp=interp)
    assert out.shape == (2, 3, 3, size, size) and out.dtype == torch.float32
    assert torch.equal(clips, before), "the input is as it was"
    assert out.min() >= clips.min() - 1e-3 and out.max() <= clips.max() + 1e-3, "a mean of pixels"
    assert torch.equal(out[1, 2], resize(clips[1, 2], size, fit=fit, interp=interp)), "each frame by itself"
    assert torch.equal(out, resize(clips.numpy(), size, fit=fit, interp=interp)), "an array is a tensor"
    colour = clips[0, 0, 0, 0]
    even = resize(colour.expand(height, width, 3), size, fit=fit, interp=interp)
    torch.testing.assert_close(even, colour.float()[:, None, None].expand_as(even), atol=1e-3, rtol=0)


@pytest.mark.parametrize("interp", ["torch", "tf1", "aa"])
def test_the_right_size_is_left_alone(interp: Interp) -> None:
    frames = noise(2, 14, 14, 3)
    assert torch.equal(resize(frames, 14, interp=interp), frames.movedim(-1, 1).float())


def test_no_frames_are_no_frames() -> None:
    assert resize(noise(0, 4, 4, 3), 2).shape == (0, 3, 2, 2)
    assert resize(noise(0, 4, 4, 3), 2, interp="tf1").shape == (0, 3, 2, 2)


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(4, 4, 3),
        torch.zeros(4, 4, 3, dtype=torch.bfloat16),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        torch.zeros(4, 3, dtype=torch.uint8),
        torch.zeros(0, 4, 3, dtype=torch.uint8),
    ],
)
def test_other_things_than_frames_are_refused(frames: Tensor) -> None:
    with pytest.raises(ValueError, match="frames are"):
        resize(frames, 8)


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="no fit 'pad'"):
        resize(noise(4, 4, 3), 8, fit="pad")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="interp 'cubic'"):
        resize(noise(4, 4, 3), 8, interp="cubic")  # type: ignore[arg-type]
