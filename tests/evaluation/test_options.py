"""Choices of protocol: each changes what is measured, is in the record and its hash, and others are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import side
from one_layer_clip import make_net

from vdm.errors import UserError
from vdm.evaluation import networks
from vdm.evaluation.altered import ALTERATIONS
from vdm.evaluation.catalogue import METRICS, chosen
from vdm.evaluation.clips import Shape
from vdm.evaluation.command import evaluate_command
from vdm.evaluation.extract import Extracted, Opened
from vdm.evaluation.extractors import EXTRACTORS, extractors
from vdm.evaluation.judging import judged
from vdm.evaluation.options import CHOICES, USUAL, Options
from vdm.metrics.clip import Clip
from vdm.metrics.frechet import frechet_distance, frechet_infinity
from vdm.metrics.fvd import FVDProtocol, i3d_features
from vdm.metrics.i3d import I3D, load_i3d

CPU = torch.device("cpu")
CHANGED = {"resize": "crop", "interp": "tf1", "bn_eps": 1e-5}
WIDE = Shape(9, 8.0, 24, 48)
CLIPS = np.random.default_rng(0).integers(0, 256, (1, 9, 24, 48, 3), dtype=np.uint8)


def test_what_is_no_choice_is_refused() -> None:
    for name, values in CHOICES.items():
        assert getattr(USUAL, name) == values[0]
        assert getattr(replace(USUAL, **{name: values[-1]}), name) == values[-1]
        with pytest.raises(UserError, match=f"--{name} is zoom; it must be one of {values[0]}, {values[1]}"):
            replace(USUAL, **{name: "zoom"})


@pytest.mark.parametrize("flag", ["--resize", "--interp", "--bn_eps", "--bn-eps", "--cov", "--clip_resize"])
def test_a_flag_is_refused_before_anything_is_read(flag: str) -> None:
    with pytest.raises(UserError, match=f"argument .*{flag}.*: invalid"):
        evaluate_command([flag, "0.1", "--generated", "nowhere", "--reference", "nowhere"])


def test_flags_in_either_spelling_are_taken(tmp_path: Path) -> None:
    words = "--resize crop --interp aa --bn-eps 1e-5 --bn_eps 0.001 --cov biased --clip-resize pad --clip_resize squash"
    with pytest.raises(UserError, match="has no samples.jsonl"):
        evaluate_command([*words.split(), "--generated", str(tmp_path), "--reference", str(tmp_path)])


def test_i3d_is_shown_clips_as_it_is_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = I3D()
    for name, tensor in net.state_dict().items():
        if name.endswith("conv3d.weight"):
            tensor.normal_(std=(2.0 / tensor[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            tensor.fill_(1e-3)  # so small that epsilon counts
    path = tmp_path / "i3d_pretrained_400.pt"
    torch.save(net.state_dict(), path)
    usual = networks.open_i3d(path, CPU, WIDE)
    for option, value in CHANGED.items():
        told = extractors(replace(USUAL, **{option: value}))["i3d"].open(path, CPU, WIDE).protocol
        assert {key for key in told if told[key] != usual.protocol[key]} == {option} and told[option] == value
    rows = extractors(replace(USUAL, **CHANGED))["i3d"].open(path, CPU, WIDE).rows(CLIPS, [""])  # type: ignore[arg-type]
    direct = i3d_features(CLIPS, load_i3d(path, bn_eps=1e-5).net, protocol=FVDProtocol(**CHANGED))  # type: ignore[arg-type]
    assert np.array_equal(rows, direct.numpy())


def test_clip_is_shown_all_of_a_wide_clip_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    monkeypatch.setattr(networks, "load_clip", lambda path, fit, device: Clip(net, "abc", fit, torch.device(device)))
    for fit in ("crop", "squash", "pad"):
        opened = extractors(Options(clip_resize=fit))["clip"].open(Path("x"), CPU, WIDE)  # type: ignore[arg-type]
        middle = Clip(net, "abc", fit, CPU).frames(torch.from_numpy(CLIPS)).double().mean(1)  # type: ignore[arg-type]
        assert opened.protocol["resize"] == fit
        assert np.allclose(opened.rows(CLIPS, ["a cup"])[:, 3:27], (middle / middle.norm()).numpy(), atol=1e-6)


def test_covariances_are_divided_by_the_number_of_clips_where_it_is_told() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    generated, reference = (Extracted(s.clips, (), {(look, "i3d"): s.rows for look in ("", *ALTERATIONS)})
                            for s in (side(x.tolist()), side((2.0 * x).tolist())))  # fmt: skip
    records = [
        judged(metric, Opened(lambda frames, prompts: CLIPS), generated, reference, base={}).record
        for options in (USUAL, Options(cov="biased"))
        for metric in chosen(["fvd", "kvd"], options)
    ]
    fvd, kvd, biased_fvd, biased_kvd = records
    assert fvd.value == pytest.approx(14 / 3) and biased_fvd.value == pytest.approx(4.0)
    assert (fvd.protocol["cov"], biased_fvd.protocol["cov"]) == ("unbiased", "biased")
    assert fvd.protocol_hash != biased_fvd.protocol_hash and kvd == biased_kvd, "a kernel has no covariance"


def test_all_frechet_distances_and_no_others_know_a_biased_covariance() -> None:
    for before, after in zip(chosen(None), chosen(None, Options(cov="biased")), strict=True):
        named = before.name.startswith("fvd")
        assert (before.protocol.get("cov") == "unbiased") == named and (after.protocol.get("cov") == "biased") == named
        assert (before != after) == named
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=generator), 2.0 * torch.randn(40, 3, generator=generator)
    by_name = {metric.name: metric.measure for metric in chosen(None, Options(cov="biased"))}
    assert by_name["fvd"].of(x, y) == frechet_distance(x, y, unbiased=False)  # type: ignore[union-attr]
    infinite = frechet_infinity(x, y, seed=0, unbiased=False)
    assert by_name["fvd_inf"].of(x, y) == infinite  # type: ignore[union-attr]
    assert METRICS["fvd"].measure.of(x, y) == frechet_distance(x, y)  # type: ignore[union-attr]


def test_the_usual_choices_are_those_without_any() -> None:
    assert EXTRACTORS.keys() == extractors(Options(resize="crop")).keys()
    assert Options("squash", "torch", 1e-3, "unbiased", "crop") == USUAL
    assert USUAL.of_i3d(repeat=1) == FVDProtocol()
