"""C3D against convolutions and pools written out, and its two public files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from vdm.errors import UserError
from vdm.metrics.c3d import C3D, Judge, Scripted, c3d_logits, load_c3d

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning")

Array = npt.NDArray[np.float64]
LAYERS = ("conv1a", "conv2a", "conv3a", "conv3b", "conv4a", "conv4b", "conv5a", "conv5b", "fc6", "fc7", "fc8")


def clips(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def narrow(seed: int = 0) -> C3D:
    """The published structure, 32 times narrower, with weights under which numbers neither die out nor grow."""
    net = C3D(width=2, hidden=8)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        fan_in = tensor[0].numel() if tensor.dim() > 1 else 100
        scale = 30.0 if name == "mean" else (2 / fan_in) ** 0.5
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    net.mean.add_(100.0)
    return net


# The network


def resized(channel: Array) -> Array:
    """(H,W) -> (112,112): the corners stay the corners."""
    for axis in (0, 1):
        places = np.linspace(0, channel.shape[axis] - 1, 112)
        channel = np.apply_along_axis(lambda line, x=places: np.interp(x, np.arange(len(line)), line), axis, channel)
    return channel


def pooled(x: Array, kernel: tuple[int, int, int]) -> Array:
    """(C,T,H,W): windows side by side, the last of them cut off by the edge where it must be."""
    t, h, w = (-(-size // step) for size, step in zip(x.shape[1:], kernel, strict=True))
    out = np.empty((len(x), t, h, w))
    for i, j, k in np.ndindex(t, h, w):
        a, b, c = (place * step for place, step in zip((i, j, k), kernel, strict=True))
        out[:, i, j, k] = x[:, a : a + kernel[0], b : b + kernel[1], c : c + kernel[2]].max((1, 2, 3))
    return out


def by_hand(net: C3D, clip: Tensor) -> Array:
    """Logits (101,) of uint8 (16,H,W,3), layer by layer in float64."""
    weights = {name: tensor.double() for name, tensor in net.state_dict().items()}
    frames = clip.numpy().astype(np.float64)
    x = np.stack([[resized(frame[:, :, channel]) for frame in frames] for channel in (2, 1, 0)])
    x = x - weights["mean"].numpy()
    for name in LAYERS[:8]:
        padded = torch.nn.functional.pad(torch.from_numpy(x)[None], (1,) * 6)
        x = torch.conv3d(padded, weights[f"{name}.weight"], weights[f"{name}.bias"])[0].numpy().clip(0)
        if name in ("conv1a", "conv2a", "conv3b", "conv4b", "conv5b"):
            x = pooled(x, (1, 2, 2) if name == "conv1a" else (2, 2, 2))
    x = x.ravel()
    for name in LAYERS[8:]:
        x = weights[f"{name}.weight"].numpy() @ x + weights[f"{name}.bias"].numpy()
        x = x if name == "fc8" else x.clip(0)
    return x


@pytest.mark.parametrize(("height", "width"), [(20, 31), (120, 160)])
def test_against_the_network_written_out(height: int, width: int) -> None:
    net, clip = narrow(), clips(16, height, width, 3)
    expected = by_hand(net, clip)
    assert expected.std() > 0.1
    found = c3d_logits(clip[None], Judge(net, "0"))
    assert found.shape == (1, 101) and found.dtype == torch.float32
    np.testing.assert_allclose(found[0], expected, rtol=2e-4, atol=2e-4)


def test_the_published_size() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in C3D().state_dict().items()}
    assert shapes["conv1a.weight"] == (64, 3, 3, 3, 3) and shapes["conv5b.weight"] == (512, 512, 3, 3, 3)
    assert shapes["fc6.weight"] == (4096, 8192) and shapes["fc8.weight"] == (101, 4096)


def test_neither_the_batch_nor_what_is_around_matters() -> None:
    judge, batch = Judge(narrow(), "0"), clips(2, 16, 10, 12, 3)
    before = batch.clone()
    whole = c3d_logits(batch, judge)
    assert torch.equal(whole, torch.cat([c3d_logits(clip[None], judge) for clip in batch]))
    assert torch.equal(whole.flip(0), c3d_logits(batch.numpy()[::-1].copy(), judge))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole, c3d_logits(batch, judge))
    assert torch.equal(batch, before)
    assert c3d_logits(batch[:0], judge).shape == (0, 101)


def test_other_clips_are_refused() -> None:
    judge = Judge(narrow(), "0")
    with pytest.raises(UserError, match="16 frames, not 15"):
        c3d_logits(clips(1, 15, 8, 8, 3), judge)
    with pytest.raises(ValueError, match="clips are uint8"):
        c3d_logits(clips(16, 8, 8, 3), judge)
    with pytest.raises(ValueError, match="frames are uint8"):
        c3d_logits(torch.zeros(1, 16, 8, 8, 3), judge)
    judge.net.fc8.bias[3] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        c3d_logits(clips(1, 16, 8, 8, 3), judge)


# TorchScript


class Answers(nn.Module):
    """Takes what StyleGAN-V's file takes, and answers as that does, with probabilities; some are exactly zero."""

    def __init__(self, *, classes: int = 101, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.register_buffer("weight", 3 * torch.linspace(0, 99, 3 * classes).sin().reshape(classes, 3))

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8 and x.dim() == 5 and x.size(1) == 3 and x.size(2) == 16
        return (x.float().mean([2, 3, 4]) @ self.weight.t()).softmax(1) * self.scale


class OfFloats(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x


def test_the_scripted_file_is_called_as_it_is_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "c3d_ucf101.pt"
    torch.jit.script(Answers()).save(str(path))
    judge = load_c3d(path)
    assert isinstance(judge.net, Scripted) and judge.metric == "is_c3d_ucf101"
    assert judge.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    batch = clips(2, 16, 9, 14, 3)
    batch[..., 0] //= 4  # channels differ, so their order shows
    expected = Answers()(batch.permute(0, 4, 1, 2, 3))
    assert (expected == 0).any()
    logits = c3d_logits(batch, judge)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.double().softmax(1), expected.double(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Answers(classes=400), "does not judge by the 101 classes of UCF-101"),
        (Answers(scale=5.0), "does not answer with probabilities"),
        (Answers(scale=-1.0), "does not answer with probabilities"),
        (OfFloats(), "does not take uint8 clips"),
    ],
)
def test_another_script_is_refused(tmp_path: Path, module: nn.Module, reason: str) -> None:
    path = tmp_path / "c3d_ucf101.pt"
    torch.jit.script(module).save(str(path))
    with pytest.raises(UserError, match=reason) as error:
        c3d_logits(clips(1, 16, 9, 14, 3), load_c3d(path))
    assert str(path) in str(error.value)


# Chainer's file


def arrays() -> dict[str, npt.NDArray[np.float32]]:
    """The published shapes in views of one number."""
    with torch.device("meta"):
        specs = C3D().state_dict()
    named = {f"{name}/{'W' if part == 'weight' else 'b'}": specs[f"{name}.{part}"]
             for name in LAYERS for part in ("weight", "bias")}  # fmt: skip
    return {name: np.broadcast_to(np.float32(0), tuple(spec.shape)) for name, spec in named.items()}


def mean_clip(*, width: int = 171) -> npt.NDArray[np.float32]:
    rows, columns = np.mgrid[:128, :width].astype(np.float32)
    return np.stack(
        [np.stack([channel * 50 + rows + columns / 1024 + t / 64 for t in range(16)]) for channel in range(3)]
    )


@pytest.mark.slow
def test_the_chainer_file_is_our_network(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    held = dict(arrays())
    held["conv1a/W"] = generator.normal(size=(64, 3, 3, 3, 3)).astype(np.float32)
    held["conv4b/b"] = generator.normal(size=512).astype(np.float32)
    held["fc8/b"] = generator.normal(size=101)  # of doubles: the type is not asked
    np.savez_compressed(tmp_path / "conv3d_deepnetA_ucf.npz", **held)
    with pytest.raises(UserError, match="needs its mean clip beside it: .*mean2.npz does not exist"):
        load_c3d(tmp_path / "conv3d_deepnetA_ucf.npz")
    np.savez(tmp_path / "mean2.npz", mean=mean_clip())

    judge = load_c3d(tmp_path / "conv3d_deepnetA_ucf.npz")
    assert judge.metric == "is_c3d_ucf101"
    state = judge.net.state_dict()
    for name, key in (("conv1a.weight", "conv1a/W"), ("conv4b.bias", "conv4b/b"), ("fc8.bias", "fc8/b")):
        np.testing.assert_array_equal(state[name], held[key].astype(np.float32))
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    np.testing.assert_array_equal(state["mean"], mean_clip()[:, :, 8:120, 8:120])
    logits = c3d_logits(clips(1, 16, 40, 60, 3), judge)
    torch.testing.assert_close(logits[0], state["fc8.bias"])


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("conv1a/W", None, "is no C3D, for it has no conv1a/W"),
        ("conv1a/b", None, "is not all of a C3D: it lacks conv1a/b"),
        ("conv1a/b", np.zeros(63, np.float32), r"conv1a/b is \(63,\), not \(64,\)"),
        ("conv1a/b", np.full(64, np.nan, np.float32), "is damaged: conv1a/b"),
        ("conv1a/b", np.zeros(64, np.int64), "is damaged: conv1a/b"),
        ("conv1a/b", np.array([None] * 64), "cannot be read as an .npz file"),
    ],
)
def test_another_npz_is_refused(tmp_path: Path, name: str, array: npt.NDArray[np.generic] | None, reason: str) -> None:
    held: dict[str, npt.NDArray[np.generic]] = {"conv1a/W": np.zeros((64, 3, 3, 3, 3), np.float32)}
    if array is None:
        held.pop(name, None)
    else:
        held[name] = array
    path = tmp_path / "conv3d_deepnetA_ucf.npz"
    np.savez(path, allow_pickle=True, **held)
    np.savez(tmp_path / "mean2.npz", mean=mean_clip())
    with pytest.raises(UserError, match=reason) as error:
        load_c3d(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("mean", [np.zeros((3, 16, 112, 112)), np.zeros((16, 3, 128, 171)), np.zeros(3), None])
def test_a_mean_clip_of_another_shape_is_refused(tmp_path: Path, mean: Array | None) -> None:
    np.savez(tmp_path / "c3d.npz", **{"conv1a/W": np.zeros((64, 3, 3, 3, 3), np.float32)})
    np.savez(tmp_path / "mean2.npz", **({"mean": mean} if mean is not None else {"other": np.zeros(1)}))
    with pytest.raises(UserError, match="mean2.npz holds no mean clip"):
        load_c3d(tmp_path / "c3d.npz")


def test_what_is_no_such_file_is_named(tmp_path: Path) -> None:
    missing, text, array, cut = (tmp_path / name for name in ("a.npz", "b.npz", "c.npz", "d.npz"))
    text.write_text("no weights")
    with array.open("wb") as stream:
        np.save(stream, np.zeros(3))
    np.savez(cut, **{"conv1a/W": np.zeros((64, 3, 3, 3, 3), np.float32)})
    cut.write_bytes(cut.read_bytes()[:2000])
    for path in (text, array, cut):
        with pytest.raises(UserError, match="cannot be read as an .npz file") as error:
            load_c3d(path)
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        load_c3d(missing)
