"""`evaluate` in this process: the same answer twice, whatever the list's order, and nothing else touched."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vdm.data.mini_something import render_clip, write_ssv2
from vdm.data.video import read_clip, write_video
from vdm.errors import UserError
from vdm.evaluate import Request, evaluate
from vdm.evaluation import clips
from vdm.evaluation.clips import BadClip, Clip, Shape
from vdm.evaluation.command import evaluate_command
from vdm.evaluation.records import PROTOCOL_KEYS, protocol_hash
from vdm.metrics.similarity import frame_ssim

NASTY = '<script>alert("x")</script> & more'
METRICS = ("frame_ssim", "action_accuracy", "fvd", "r_precision")


class Page(HTMLParser):
    """Fails where tags do not nest, or where something is fetched from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        assert all((value or "").startswith("data:") for name, value in attrs if name in ("src", "href"))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def generated(folder: Path, count: int, *, prompt: str | None = None) -> Path:
    """A sample folder of rendered clips, 6 frames of 48 pixels a side."""
    folder.mkdir()
    lines = []
    for i in range(count):
        clip = render_clip(i, seed=5, height=48, width=48, num_frames=6, fps=8.0)
        write_video(folder / f"{i:05d}.mp4", clip.frames, fps=8.0)
        line = {"file": f"{i:05d}.mp4", "prompt": clip.label if prompt is None or i else prompt, "seed": i}
        lines.append({**line, "num_frames": 6, "height": 48, "width": 48, "fps": 8.0})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "clips"
    write_ssv2(folder, num_clips=5, size=64, num_frames=20, fps=12.0, seed=0)
    return folder


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_it_is_pure(tmp_path: Path, reference: Path) -> None:
    folder = generated(tmp_path / "samples", 4, prompt=NASTY)
    before = files_of(folder), files_of(reference)
    first = evaluate(Request(folder, reference, tmp_path / "first", METRICS))
    assert (files_of(folder), files_of(reference)) == before
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(lines[::-1]))
    again = evaluate(Request(folder, reference, tmp_path / "again", METRICS[::-1]))
    cached = evaluate(Request(folder, reference, tmp_path / "first", METRICS))
    assert first == again == cached
    written, others = files_of(tmp_path / "first"), files_of(tmp_path / "again")
    assert {name: written[name] for name in written if "cache" not in name} == {
        name: others[name] for name in others if "cache" not in name
    }

    ssim, action, fvd, r_precision = (next(one for one in first if one.metric == name) for name in METRICS)
    assert all(protocol_hash(one.protocol) == one.protocol_hash for one in first)
    assert all(set(PROTOCOL_KEYS) <= set(one.protocol) for one in first)
    assert (ssim.n_generated, ssim.n_reference, action.n_generated, action.n_reference) == (4, 5, 3, 5)
    assert fvd.value is None and fvd.status.startswith("skipped: needs i3d_torchscript.pt, put it at weights/i3d_")
    assert r_precision.status.startswith("skipped: needs ViT-B-32.pt, put it at weights/ViT-B-32.pt")

    decoded = [read_clip(folder / f"{i:05d}.mp4", fps=8.0, num_frames=6) for i in range(4)]
    direct = frame_ssim(torch.from_numpy(np.stack(decoded)))
    assert ssim.value == pytest.approx(direct.mean().item(), abs=1e-15)
    assert ssim.ceilings["frozen"] == 1.0 and set(ssim.ceilings) == {"reference", "frozen", "shuffled", "noise"}
    assert ssim.ci95 is not None and ssim.ci95[0] < ssim.value < ssim.ci95[1]
    values = [json.loads(line) for line in (tmp_path / "first" / "per_clip.jsonl").read_text().splitlines()]
    ours = [line for line in values if line["side"] == "generated"]
    assert [line["values"]["frame_ssim"] for line in ours] == direct.tolist()
    assert [line["seed"] for line in ours] == [0, 1, 2, 3] and "action_accuracy" not in ours[0]["values"]
    assert all(line["nearest"] != line["id"] for line in values if line["side"] == "reference")

    text = (tmp_path / "first" / "report.html").read_text()
    page = Page(text)
    assert NASTY not in text and "&lt;script&gt;" in text and page.count["video"] == 8 and page.count["svg"] == 2


def test_a_mean_of_two_halves_bounds_the_floor(tmp_path: Path, reference: Path) -> None:
    (record,) = evaluate(Request(generated(tmp_path / "samples", 2), reference, tmp_path / "out", ("motion_energy",)))
    lines = [json.loads(line) for line in (tmp_path / "out" / "per_clip.jsonl").read_text().splitlines()]
    values = [line["values"]["motion_energy"] for line in lines if line["side"] == "reference"]
    assert record.floor is not None and 0.0 <= record.floor <= max(values) - min(values)
    assert record.ceilings["reference"] == pytest.approx(np.mean(values), abs=1e-15)
    assert record.ceilings["frozen"] == 0.0 < record.ceilings["shuffled"]


def test_a_hash_is_of_the_reference_that_was_measured_by(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two references have the same ids, and one loses a clip while it is decoded."""
    folder, other, cut = generated(tmp_path / "samples", 2), tmp_path / "other", tmp_path / "cut"
    write_ssv2(other, num_clips=5, size=64, num_frames=20, fps=12.0, seed=9)
    shutil.copytree(reference, cut)
    first = sorted((cut / "20bn-something-something-v2").glob("*.mp4"))[0]
    first.write_bytes(first.read_bytes()[:900])
    hashes = {
        evaluate(Request(folder, root, tmp_path / "out", ("frame_ssim",)))[0].protocol_hash
        for root in (reference, other, cut)
    }
    assert len(hashes) == 3
    lines = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text(lines.replace('"fps": 8.0', '"fps": 8'))
    again = evaluate(Request(folder, reference, tmp_path / "out", ("frame_ssim",)))[0]
    assert again.protocol_hash in hashes, "8 and 8.0 frames a second are the same"

    def read_reference(clip: Clip, shape: Shape) -> np.ndarray:
        if clip.id == first.stem:
            raise BadClip("a decoder that cannot read it")
        return clips.read_reference(clip, shape)

    monkeypatch.setattr("vdm.evaluate.clips", SimpleNamespace(**{**vars(clips), "read_reference": read_reference}))
    fewer = evaluate(Request(folder, reference, tmp_path / "fewer", ("frame_ssim",)))[0]
    assert fewer.n_reference == 4 and fewer.protocol_hash != again.protocol_hash


def test_a_run_that_was_cut_short_leaves_no_records_of_another(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = generated(tmp_path / "samples", 2), tmp_path / "out"
    request = Request(folder, reference, out, ("frame_ssim",))
    (record,) = evaluate(request)
    assert record.protocol["per_clip_sha256"] == hashlib.sha256((out / "per_clip.jsonl").read_bytes()).hexdigest()
    monkeypatch.setattr("vdm.evaluate.write_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(request)
    assert (out / "per_clip.jsonl").exists() and not (out / "metrics.json").exists()
    (out / "metrics.json").mkdir()
    with pytest.raises(UserError, match="cannot remove .*metrics.json: .*; choose another --output_dir"):
        evaluate(request)


def test_names_that_cannot_be_written_are_written_with_escapes(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = generated(tmp_path / "samples", 2)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for i, name in enumerate(("caf\xe9.mp4", os.fsdecode(b"\xff.mp4"))):
        try:
            (folder / name).write_bytes(name.encode("utf-8", "surrogateescape"))
        except OSError:
            pytest.skip("the file system has no such names")
        lines.append({**lines[0], "file": name, "seed": 10 + i})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="ascii", write_through=True))
    words = ("--generated", folder, "--reference", reference, "--output_dir", tmp_path / "out")
    evaluate_command([*map(str, words), "--metrics", "frame_ssim"])
    assert b"caf\\xe9.mp4 cannot be read" in printed.getvalue()
    table = (tmp_path / "out" / "metrics.md").read_text(encoding="utf-8")
    assert "caf\xe9.mp4 cannot be read" in table and "\\udcff.mp4 cannot be read" in table


def test_nothing_is_written_where_nothing_can_be_measured(tmp_path: Path, reference: Path) -> None:
    folder = generated(tmp_path / "samples", 2)
    for request, sentence in (
        (Request(folder, reference, tmp_path / "out", ("fid",)), "no metric 'fid'"),
        (Request(tmp_path, reference, tmp_path / "out"), "has no samples.jsonl"),
        (Request(folder, tmp_path / "nowhere", tmp_path / "out"), "nowhere does not exist"),
        (Request(folder, folder, tmp_path / "out"), "no caption|usable clips|annotations"),
    ):
        with pytest.raises(UserError, match=sentence):
            evaluate(request)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .* choose another --output_dir"):
        evaluate(Request(folder, reference, tmp_path / "file"))
    for path in folder.glob("*.mp4"):
        path.write_bytes(path.name.encode())
    with pytest.raises(
        UserError, match="0 of 2 generated clips can be read .* too few to evaluate \\(00000.mp4 cannot"
    ):
        evaluate(Request(folder, reference, tmp_path / "out"))
