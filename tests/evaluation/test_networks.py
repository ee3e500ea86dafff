"""Networks as extractors: rows are what the metric's own functions say of each clip, whatever the batch."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_layer_clip import CONFIG, make_net
from safetensors.torch import save_file

from vdm.data.mini_something import write_ssv2
from vdm.errors import UserError
from vdm.evaluation import networks
from vdm.evaluation.clips import Shape
from vdm.evaluation.records import digest
from vdm.metrics.c3d import C3D, Judge
from vdm.metrics.clip import CLIP_SCORE_PREFIX, Clip, clip_score, clipsim
from vdm.metrics.consistency import background_consistency
from vdm.metrics.fvd import i3d_features
from vdm.metrics.i3d import I3D, load_i3d
from vdm.metrics.toy import SHIPPED

CPU = torch.device("cpu")
SHAPE = Shape(9, 8.0, 40, 40)
PROMPTS = ["a red ball", "a blue cup"]


def clips(count: int = 2) -> np.ndarray:
    """Of another size than any of the networks takes."""
    return np.random.default_rng(0).integers(0, 256, (count, 9, 40, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an I3D that was never trained, under a name by which it is taken for one that was."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    net = I3D()
    for name, tensor in net.state_dict().items():
        if name.endswith("conv3d.weight"):
            tensor.normal_(std=(2.0 / tensor[0].numel()) ** 0.5)
    torch.save(net.state_dict(), folder / "i3d_pretrained_400.pt")
    return folder


def test_rows_of_clip_are_its_scores_and_two_unit_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Clip(make_net(), "abc", "crop", CPU)
    monkeypatch.setattr(networks, "load_clip", lambda path, fit, device: clip)
    opened = networks.open_clip(Path("x"), CPU, SHAPE)
    assert (opened.sha256, opened.protocol["layer"], opened.protocol["resize"]) == ("abc", "tiny", "crop")
    rows = opened.rows(clips(), PROMPTS)
    frames, texts = clip.frames(torch.from_numpy(clips())), clip.texts(PROMPTS)
    means = frames.double().mean(1)
    prefixed = clip.texts([CLIP_SCORE_PREFIX + prompt for prompt in PROMPTS])
    wanted = [clipsim(frames, texts), clip_score(frames, prefixed)]
    wanted.append(background_consistency(clip.frames(torch.from_numpy(clips()), antialias=False)))
    assert rows.shape == (2, 3 + 24 + 24)
    assert np.allclose(rows[:, :3], torch.stack(wanted, dim=1).numpy(), atol=1e-5)
    assert np.allclose(rows[:, 3:27], (means / means.norm(dim=1, keepdim=True)).numpy(), atol=1e-5)
    assert np.allclose(rows[:, 27:], texts.numpy(), atol=1e-5)
    assert np.array_equal(opened.rows(clips()[1:], PROMPTS[1:]), rows[1:]), "each clip by itself"


def test_the_config_beside_a_clip_is_in_its_protocol(tmp_path: Path) -> None:
    path, config = tmp_path / "open_clip_model.safetensors", tmp_path / "open_clip_config.json"
    save_file(make_net().net.state_dict(), path)
    protocols = []
    for quick, mean in ((False, 0.5), (True, 0.5), (True, 0.25)):
        pixels = {"mean": [mean] * 3, "std": [0.5] * 3}
        config.write_text(json.dumps({"model_cfg": {**CONFIG, "quick_gelu": quick}, "preprocess_cfg": pixels}))
        opened = networks.open_clip(path, CPU, SHAPE)
        protocols.append(opened.protocol)
        assert (opened.protocol["quick_gelu"], opened.protocol["mean"]) == (quick, [mean] * 3)
        assert opened.protocol["std"] == [0.5] * 3 and opened.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert opened.protocol["config_sha256"] == hashlib.sha256(config.read_bytes()).hexdigest()
    assert len({digest(protocol) for protocol in protocols}) == 3


def test_the_mean_clip_beside_a_c3d_is_in_its_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "load_c3d", lambda path: Judge(C3D(width=2, hidden=8), "abc"))
    (tmp_path / "mean2.npz").write_bytes(b"a mean clip")
    opened = networks.open_c3d(tmp_path / "conv3d_deepnetA_ucf.npz", CPU, SHAPE)
    assert opened.protocol["mean_sha256"] == hashlib.sha256(b"a mean clip").hexdigest()


def test_rows_of_i3d_are_its_logits(weights: Path) -> None:
    path = weights / "i3d_pretrained_400.pt"
    opened = networks.open_i3d(path, CPU, SHAPE)
    direct = i3d_features(clips(1), load_i3d(path).net)
    assert np.array_equal(opened.rows(clips(1), PROMPTS[:1]), direct.numpy())
    wanted = {
        "resize": "squash",
        "interp": "torch",
        "layer": "logits400",
        "bn_eps": 1e-3,
        "repeat": 1,
        "dtype": "float32",
    }
    assert opened.protocol == wanted and "not byte for byte a published file" in opened.warning
    with pytest.raises(UserError, match="holds the weights of fvd, not of fvd_i3d_imagenet"):
        networks.open_i3d_imagenet(path, CPU, SHAPE)
    assert networks.open_i3d(path, CPU, Shape(8, 8.0, 40, 40)).protocol["repeat"] == 2


@pytest.mark.skipif(not SHIPPED.is_file(), reason=f"{SHIPPED.name} does not come with this vdm")
def test_rows_of_the_toy_classifier_are_features_then_logits() -> None:
    opened = networks.open_toy(None, CPU, SHAPE)
    rows = opened.rows(clips(), PROMPTS)
    assert rows.shape == (2, 128 + 16) and (rows[:, :128] >= 0).all()
    assert np.array_equal(opened.rows(clips()[1:], PROMPTS[1:]), rows[1:])


@pytest.mark.slow
def test_fvd_of_a_set_from_itself_is_zero_and_untrained_weights_are_found_out(
    weights: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    reference, samples = tmp_path / "reference", tmp_path / "samples"
    write_ssv2(reference, num_clips=4, size=32, num_frames=9, fps=8.0, seed=0)
    samples.mkdir()
    lines = []
    for i, file in enumerate(sorted((reference / "20bn-something-something-v2").glob("*.mp4"))):
        shutil.copy(file, samples / f"{i}.mp4")
        size = {"num_frames": 9, "height": 32, "width": 32, "fps": 8.0}
        lines.append({"file": f"{i}.mp4", "prompt": f"prompt {i}", "seed": i, **size})
    (samples / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = (
        "--generated",
        samples,
        "--reference",
        reference,
        "--output_dir",
        tmp_path / "out",
        "--weights_dir",
        weights,
    )
    result = command("vdm", "evaluate", *words, "--metrics", "fvd,kvd,fvd_inf,is_i3d_k400")
    assert result.code == 0, result
    found = {one["metric"]: one for one in json.loads((tmp_path / "out" / "metrics.json").read_text())}
    fvd = found["fvd"]
    assert 0.0 <= fvd["value"] < 1e-9 * fvd["ceilings"]["noise"] and not fvd["valid"]
    assert set(fvd["ceilings"]) == {"frozen", "shuffled", "noise"}
    assert (
        fvd["weights_sha256"] == fvd["protocol"]["weights_sha256"] == load_i3d(weights / "i3d_pretrained_400.pt").sha256
    )
    told = " ".join(fvd["warnings"])
    assert "not byte for byte a published file" in told and "fewer clips than features" in told
    assert found["fvd_inf"]["status"] == "skipped: needs at least 1200 clips on each side, and there are 4"
    assert not found["kvd"]["valid"], "fewer than 16 clips, and copies of the reference"
    assert 1.0 <= found["is_i3d_k400"]["value"] <= 4.0
    cached = {file.parent.name.split("-")[0] for file in (tmp_path / "out" / "cache").rglob("*.safetensors")}
    assert cached == {"i3d", "thumbnail"}

    result = command("vdm", "evaluate", "--selftest", "--weights_dir", weights)
    assert (
        result.code == 1
        and "OFF  i3d_pretrained_400.pt: black to white clips of 16 frames: expected 152.92" in result.out
    )
