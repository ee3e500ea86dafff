"""VideoMAE against its definition in float64 and against transformers', its pixels, and its file in every wrapping."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from vdm.errors import UserError
from vdm.metrics import videomae
from vdm.metrics.videomae import VideoMae, VideoMaeFeatures, load_videomae, sinusoids

WIDTH, DEPTH, HEADS, HIDDEN, PATCH, SIZE = 24, 2, 3, 40, 4, 12


def small() -> VideoMae:
    return VideoMae(width=WIDTH, depth=DEPTH, heads=HEADS, hidden=HIDDEN, patch=PATCH, size=SIZE)


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """Tensors as the file has them: separate biases, none for the key, and a classifier."""
    shapes = {"patch_embed.proj.weight": (WIDTH, 3, 2, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    for i in range(DEPTH):
        attention = {"q_bias": (WIDTH,), "v_bias": (WIDTH,), "qkv.weight": (3 * WIDTH, WIDTH),
                     "proj.weight": (WIDTH, WIDTH), "proj.bias": (WIDTH,)}  # fmt: skip
        mlp = {
            "fc1.weight": (HIDDEN, WIDTH),
            "fc1.bias": (HIDDEN,),
            "fc2.weight": (WIDTH, HIDDEN),
            "fc2.bias": (WIDTH,),
        }
        shapes |= {f"blocks.{i}.attn.{name}": shape for name, shape in attention.items()}
        shapes |= {f"blocks.{i}.mlp.{name}": shape for name, shape in mlp.items()}
        shapes |= {f"blocks.{i}.norm{n}.{kind}": (WIDTH,) for n in (1, 2) for kind in ("weight", "bias")}
    shapes |= {"fc_norm.weight": (WIDTH,), "fc_norm.bias": (WIDTH,), "head.weight": (174, WIDTH), "head.bias": (174,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], VideoMaeFeatures]:
    """Save what is given with torch.save, and load it as if the network were small."""
    monkeypatch.setattr(videomae, "VideoMae", small)

    def load(state: object) -> VideoMaeFeatures:
        torch.save(state, tmp_path / "g.pth")
        return load_videomae(tmp_path / "g.pth")

    return load


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return torch.randint(0, 256, (3, 16, 9, 14, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def by_definition(published: dict[str, Tensor], clips: Tensor, *, normalised: bool = False) -> Tensor:
    """In float64, from pixels on, with explicit patches, heads, softmax, norms and GELU."""
    w = {name: tensor.double() for name, tensor in published.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    frames = F.interpolate(clips.flatten(0, 1).permute(0, 3, 1, 2).double() / 255, size=(SIZE, SIZE), mode="bilinear")
    if normalised:
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()[:, :, None, None]
        frames = (frames - mean) / std
    video = frames.unflatten(0, clips.shape[:2])  # (B, 16, 3, 12, 12)
    tubes = video.reshape(len(clips), 8, 2, 3, 3, PATCH, 3, PATCH)  # (B, t, 2, 3, y, PATCH, x, PATCH)
    x = torch.einsum("btkcypxq,dckpq->btyxd", tubes, w["patch_embed.proj.weight"]).flatten(1, 3)
    place = [[math.sin(n / 10000 ** (i / WIDTH)) if i % 2 == 0 else math.cos(n / 10000 ** ((i - 1) / WIDTH))
              for i in range(WIDTH)] for n in range(72)]  # fmt: skip
    x = x + w["patch_embed.proj.bias"] + torch.tensor(place, dtype=torch.float64)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        q, k, v = (norm(x, f"{block}.norm1") @ w[f"{block}.attn.qkv.weight"].T).chunk(3, -1)
        q, v = q + w[f"{block}.attn.q_bias"], v + w[f"{block}.attn.v_bias"]
        heads = [
            (a @ b.mT / 8**0.5).softmax(-1) @ c for a, b, c in zip(*(t.split(8, -1) for t in (q, k, v)), strict=True)
        ]
        x = x + torch.cat(heads, -1) @ w[f"{block}.attn.proj.weight"].T + w[f"{block}.attn.proj.bias"]
        h = norm(x, f"{block}.norm2") @ w[f"{block}.mlp.fc1.weight"].T + w[f"{block}.mlp.fc1.bias"]
        x = x + h * (1 + torch.erf(h / 2**0.5)) / 2 @ w[f"{block}.mlp.fc2.weight"].T + w[f"{block}.mlp.fc2.bias"]
    pooled = norm(x.mean(1), "fc_norm")
    return pooled @ w["head.weight"].T + w["head.bias"] if normalised else pooled


@pytest.mark.parametrize("wrapping", ["module", "model", None])
def test_equals_the_definition(
    load: Callable[[object], VideoMaeFeatures], published: dict[str, Tensor], clips: Tensor, wrapping: str | None
) -> None:
    found = load({wrapping: published} if wrapping else published)
    assert len(found.sha256) == 64 and not found.net.training
    torch.testing.assert_close(found.features(clips).double(), by_definition(published, clips), rtol=0, atol=1e-4)
    wanted = by_definition(published, clips, normalised=True)
    assert found.logits(clips).shape == (3, 174)
    torch.testing.assert_close(found.logits(clips).double(), wanted, rtol=0, atol=1e-4)


def test_a_safetensors_file_is_read_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: dict[str, Tensor], clips: Tensor
) -> None:
    monkeypatch.setattr(videomae, "VideoMae", small)
    save_file(published, tmp_path / "g.safetensors")
    found = load_videomae(tmp_path / "g.safetensors").features(clips)
    torch.testing.assert_close(found.double(), by_definition(published, clips), rtol=0, atol=1e-4)


def test_pure_and_batch_size_does_not_matter(
    load: Callable[[object], VideoMaeFeatures], published: dict[str, Tensor], clips: Tensor
) -> None:
    found, before = load(published), clips.clone()
    whole = found.features(clips)
    assert whole.shape == (3, WIDTH) and whole.dtype == torch.float32 and torch.equal(found.features(clips), whole)
    torch.testing.assert_close(torch.cat([found.features(one[None]) for one in clips]), whole, rtol=0, atol=1e-5)
    assert torch.equal(clips, before)
    assert (found.features(clips.flip(1)) - whole).abs().max() > 0.01, "it sees the order of the frames"


def test_what_is_refused(
    load: Callable[[object], VideoMaeFeatures], published: dict[str, Tensor], clips: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="16 frames, got 8"):
        load(published).features(clips[:, :8])
    with pytest.raises(ValueError, match="NaN"):
        load({**published, "fc_norm.bias": torch.full((WIDTH,), torch.nan)}).features(clips)
    for state, message in (
        ({"module": published, "args": Namespace(lr=1)}, "more than tensors"),
        ({"module": {"x": 3}}, "no weights by name"),
        ([published], "no weights by name"),
        ({name: tensor for name, tensor in published.items() if "fc_norm" not in name}, "not a VideoMAE"),
        ({name: tensor for name, tensor in published.items() if "head" not in name}, "not a VideoMAE"),
        (
            {name: tensor for name, tensor in published.items() if "1.attn.v_bias" not in name},
            "no blocks.1.attn.v_bias",
        ),
        ({name: tensor for name, tensor in published.items() if "1.mlp.fc1.bias" not in name}, "no blocks.1.mlp.fc1"),
    ):
        with pytest.raises(UserError, match=message):
            load(state)
    with pytest.raises(UserError, match="do not exist"):
        load_videomae(tmp_path / "none.pth")


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        net = VideoMae()
    d, h = 1408, 6144
    block = (3 * d * d + 3 * d) + (d * d + d) + 4 * d + (2 * d * h + h + d)
    assert sum(p.numel() for p in net.parameters()) == 40 * block + (3 * 2 * 14 * 14 * d + d) + 2 * d + 174 * (d + 1)
    assert sinusoids(2048, 1408).shape == (2048, 1408)


@pytest.mark.parity
def test_equals_transformers(
    load: Callable[[object], VideoMaeFeatures], published: dict[str, Tensor], clips: Tensor
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=SIZE, patch_size=PATCH, num_frames=16, tubelet_size=2, hidden_size=WIDTH, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, intermediate_size=HIDDEN, layer_norm_eps=1e-6, num_labels=WIDTH,
    )  # fmt: skip
    theirs = transformers.VideoMAEForVideoClassification(config).eval()
    state = theirs.state_dict()
    names = {
        "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
        "layernorm_before": "norm1", "layernorm_after": "norm2",
    }  # fmt: skip
    for i in range(DEPTH):
        layer, block = f"videomae.encoder.layer.{i}", f"blocks.{i}"
        for part, one in zip(
            ("query", "key", "value"), published[f"{block}.attn.qkv.weight"].split(WIDTH), strict=True
        ):
            state[f"{layer}.attention.attention.{part}.weight"] = one
        for part, bias in (("query", "q_bias"), ("value", "v_bias")):
            state[f"{layer}.attention.attention.{part}.bias"] = published[f"{block}.attn.{bias}"]
        for name, ours in names.items():
            for kind in ("weight", "bias"):
                state[f"{layer}.{name}.{kind}"] = published[f"{block}.{ours}.{kind}"]
    for kind in ("weight", "bias"):
        state[f"videomae.embeddings.patch_embeddings.projection.{kind}"] = published[f"patch_embed.proj.{kind}"]
        state[f"fc_norm.{kind}"] = published[f"fc_norm.{kind}"]
    state["classifier.weight"], state["classifier.bias"] = torch.eye(WIDTH), torch.zeros(WIDTH)
    theirs.load_state_dict(state)
    pixels = F.interpolate(clips.flatten(0, 1).permute(0, 3, 1, 2) / 255, size=(SIZE, SIZE), mode="bilinear")
    with torch.no_grad():
        wanted = theirs(pixels.unflatten(0, clips.shape[:2])).logits
    found = load(published).features(clips)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)  # their last norm has another eps
