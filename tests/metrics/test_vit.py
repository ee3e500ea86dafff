"""DINO's network against a functional one of the test's own and timm's, its pixels against torchvision's, its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor
from torchvision.transforms import Compose, Normalize, Resize

from vdm.errors import UserError
from vdm.metrics import vit
from vdm.metrics.vit import Dino, VisionTransformer, dino_pixels, load_dino

SIZES = {"width": 24, "depth": 3, "heads": 3, "patch": 4, "grid": 5}


@pytest.fixture(scope="module")
def net() -> VisionTransformer:
    net = VisionTransformer(**SIZES)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return net.eval().requires_grad_(False)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def functional(w: dict[str, Tensor], images: Tensor) -> Tensor:
    """The same network in float64, by unfolding, explicit softmax and the definition of each layer."""
    w = {name: tensor.double() for name, tensor in w.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patches = F.unfold(images.double(), 4, stride=4).mT @ w["patch_embed.proj.weight"].flatten(1).T
    x = torch.cat([w["cls_token"].expand(len(images), 1, 24), patches + w["patch_embed.proj.bias"]], 1) + w["pos_embed"]
    for i in range(3):
        h = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        heads = []
        for n in range(3):
            q, k, v = (h[..., part * 24 + n * 8 : part * 24 + n * 8 + 8] for part in range(3))
            heads.append((q @ k.mT / 8**0.5).softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f"blocks.{i}.attn.proj")
        h = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        x = x + linear(h * (1 + torch.erf(h / 2**0.5)) / 2, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def test_equals_the_definition(net: VisionTransformer) -> None:
    images = noise(3, 3, 20, 20)
    torch.testing.assert_close(net(images).double(), functional(net.state_dict(), images), rtol=0, atol=1e-4)
    exact = VisionTransformer(**SIZES).double()
    exact.load_state_dict(net.state_dict())
    torch.testing.assert_close(exact(images.double()), functional(net.state_dict(), images), rtol=0, atol=1e-11)


def test_equals_timms_under_the_same_names(net: VisionTransformer) -> None:
    theirs = TimmViT(img_size=20, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=0).eval()
    theirs.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(net(noise(2, 3, 20, 20)), theirs(noise(2, 3, 20, 20)), rtol=0, atol=1e-5)


def cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -3/4."""
    x, a = x.abs(), -0.75
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def axis(size: int, wanted: int) -> Tensor:
    """The matrix (wanted, size) of bicubic interpolation at DINO's coordinates: scale (wanted + 0.1) / size."""
    place = (torch.arange(wanted, dtype=torch.float64) + 0.5) * size / (wanted + 0.1) - 0.5
    matrix = torch.zeros(wanted, size, dtype=torch.float64)
    for row, x in enumerate(place):
        for tap in range(int(x.floor()) - 1, int(x.floor()) + 3):
            matrix[row, min(max(tap, 0), size - 1)] += cubic(x - tap)
    return matrix


@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (9, 5), (3, 3), (14, 24)])
def test_positions_of_other_sizes_are_interpolated_as_dino_does(
    net: VisionTransformer, rows: int, columns: int
) -> None:
    grid = net.pos_embed[0, 1:].double().unflatten(0, (5, 5))
    resized = torch.einsum("rh,hwd,cw->rcd", axis(5, rows), grid, axis(5, columns))
    whole = VisionTransformer(**{**SIZES, "grid": 1})
    whole.pos_embed = torch.nn.Parameter(torch.cat([net.pos_embed[0, :1], resized.flatten(0, 1).float()])[None])
    torch.testing.assert_close(net._positions(rows, columns)[0], whole.pos_embed[0, 1:], rtol=0, atol=1e-5)
    assert net(noise(1, 3, rows * 4, columns * 4)).shape == (1, 24)


def test_the_trained_size_takes_the_positions_as_they_are(net: VisionTransformer) -> None:
    assert torch.equal(net._positions(5, 5), net.pos_embed[:, 1:])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 85), (300, 224), (224, 400)])
def test_pixels_are_vbenchs(height: int, width: int) -> None:
    frames = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalise = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform = Compose([Resize(224, antialias=False), lambda x: x.float().div(255.0), normalise])
    torch.testing.assert_close(dino_pixels(frames), transform(frames.permute(0, 3, 1, 2)), rtol=0, atol=1e-6)


def test_features_do_not_depend_on_the_batch(net: VisionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = torch.randint(0, 256, (2, 3, 8, 10, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(vit, "_SHORT_SIDE", 20)
    dino, before = Dino(net, "", torch.device("cpu")), clips.clone()
    whole = dino.frames(clips)
    assert whole.shape == (2, 3, 24) and torch.allclose(whole.norm(dim=-1), torch.ones(2, 3))
    monkeypatch.setattr(vit, "_AT_ONCE", 4)
    torch.testing.assert_close(dino.frames(clips), whole, rtol=0, atol=1e-5)
    assert torch.equal(clips, before)
    with pytest.raises(ValueError, match="uint8"):
        dino.frames(clips.float())


def test_the_weight_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        state = VisionTransformer().state_dict()
    assert len(state) == 150 and sum(tensor.numel() for tensor in state.values()) == 85_798_656
    assert {"cls_token", "pos_embed", "patch_embed.proj.bias", "blocks.11.attn.qkv.weight", "norm.bias"} <= set(state)
    assert state["pos_embed"].shape == (1, 197, 768)
    monkeypatch.setattr(vit, "VisionTransformer", lambda: VisionTransformer(**SIZES))
    small = VisionTransformer(**SIZES)
    path = tmp_path / "dino_vitbase16_pretrain.pth"
    torch.save(small.state_dict(), path)
    dino = load_dino(path)
    assert torch.equal(dino.net.cls_token, small.cls_token) and not dino.net.training and len(dino.sha256) == 64
    torch.save({name: tensor for name, tensor in small.state_dict().items() if "norm2" not in name}, path)
    with pytest.raises(UserError, match="there is no blocks.0.norm2.weight"):
        load_dino(path)
    torch.save({"cls_token": torch.zeros(1, 1, 25)}, path)
    with pytest.raises(UserError, match="is not a ViT-B as DINO names it"):
        load_dino(path)
    with pytest.raises(UserError, match="do not exist"):
        load_dino(tmp_path / "none.pth")
