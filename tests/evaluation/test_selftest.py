"""The weight files that are known: what each would be for, and what is said of one that is damaged or a copy."""

from __future__ import annotations

from pathlib import Path

import torch

from vdm.evaluation.catalogue import METRICS
from vdm.evaluation.extractors import EXTRACTORS
from vdm.evaluation.selftest import selftest, table
from vdm.metrics.c3d import MEAN_FILE
from vdm.metrics.i3d import I3D


def test_every_known_file_is_named_with_what_it_is_for(tmp_path: Path) -> None:
    checks = selftest(tmp_path)
    known = [name for one in EXTRACTORS.values() for name in one.files]
    assert sorted(check.file for check in checks) == sorted({*known, MEAN_FILE}), "each once"
    assert all((check.what, check.ok) == ("file", None) for check in checks)
    told = {check.file: check.found for check in checks}
    for metric in METRICS.values():
        for name in EXTRACTORS[metric.extractor].files:
            assert f"not there: {tmp_path / name}, for " in told[name]
            assert metric.name in told[name].split(", for ")[1].split(", ")
    assert told[MEAN_FILE].endswith("beside conv3d_deepnetA_ucf.npz")


def test_a_file_that_does_not_load_is_off_whichever_it_is(tmp_path: Path) -> None:
    names = {name for one in EXTRACTORS.values() for name in one.files}
    for name in names:
        (tmp_path / name).write_bytes(b"not weights")
    off = {check.file: check for check in selftest(tmp_path) if check.ok is False}
    assert off.keys() == names
    for name in ("vit_g_hybrid_pt_1200e_ssv2_ft.pth", "model_rgb.pth", "open_clip_model.safetensors"):
        assert off[name].what == "loading" and name in off[name].found
    assert "OFF  vit_g_hybrid_pt_1200e_ssv2_ft.pth: loading" in table(list(off.values()))


def test_a_copy_of_the_other_i3d_is_loaded_and_told_from_the_published_file(tmp_path: Path) -> None:
    torch.save(I3D().state_dict(), tmp_path / "model_rgb.pth")
    checks = {check.what: check for check in selftest(tmp_path) if check.file == "model_rgb.pth"}
    assert (checks["checksum"].ok, checks["checksum"].found) == (None, "another copy")
    assert (checks["weights"].ok, checks["weights"].found) == (True, "fvd_i3d_imagenet")
