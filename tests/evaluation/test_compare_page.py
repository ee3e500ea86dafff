"""Curves over runs: by their steps where each has one, in any order given, with intervals; and the differences."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from folders import a_record

from vdm.evaluation.compare import compare
from vdm.evaluation.compare_page import Run, places
from vdm.evaluation.per_clip import Line, write_per_clip
from vdm.evaluation.records import Record, make_record, protocol_hash, with_lines, write_records


class Page(HTMLParser):
    """Fails where tags do not nest, or where something is fetched from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not any(name in ("src", "href") for name, _ in attrs)
        if tag not in ("meta", "br", "line", "circle", "polyline", "polygon"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def a_run(folder: Path, value: float, checkpoint: str) -> Path:
    folder.mkdir()
    values = [value - 0.25, value + 0.25, value]
    lines = [Line("generated", f"{i}", f"p{i}", i, values={"ssim": v}) for i, v in enumerate(values)]
    sha256 = write_per_clip(folder, lines)
    ssim = Record("ssim", value, (value - 0.5, value + 0.125), 3, 9, valid=True)
    bare = Record("is", value, None, 3, 9, valid=True)
    records = [make_record(one, {"T": 16, "checkpoint": checkpoint}) for one in (ssim, bare)]
    write_records(folder, with_lines(records, sha256))
    return folder


def curves(folder: Path) -> tuple[str, dict[str, dict[str, object]]]:
    text = (folder / "compare.html").read_text()
    Page(text)
    data = [json.loads(html.unescape(one)) for one in re.findall(r'data-curves="([^"]*)"', text)]
    titles = re.findall(r"<figcaption><b>([^<]*)<", text)
    return text, dict(zip(titles, data, strict=True))


def test_runs_lie_along_their_training_steps(tmp_path: Path) -> None:
    names = {"a": 2000, "<b>": 500, "c": 1000}
    runs = [
        a_run(tmp_path / name, step / 1000, f"results/run/checkpoint-{step}") for name, step in names.items()
    ]  # fmt: skip
    found = compare(runs, tmp_path / "out")
    text, charts = curves(tmp_path / "out")
    assert list(charts) == ["ssim", "is"], "a chart for each metric"
    assert charts["ssim"]["along"] == "step" and charts["ssim"]["lines"] == [[[500, "0.5"], [1000, "1"], [2000, "2"]]]
    assert text.count("<polygon") == 1, "the interval of the one that has any"
    assert "&lt;b&gt;" in text and str(tmp_path / "<b>") not in text
    assert text.index("Metrics by step") < text.index("Differences from")
    assert [one.sure for one in found if one.metric == "ssim"] == [True, True]
    assert '<td class="sure">-1.5</td><td>-1.5 to -1.5</td><td>3 pairs</td>' in text
    assert '<td class="open">-1.5</td><td>-</td><td>unpaired</td>' in text
    assert (tmp_path / "out" / "compare.json").is_file()


@pytest.mark.parametrize("checkpoints", [("demo", "demo"), ("checkpoint-5", "x/checkpoint-5"), ("checkpoint-9", "")])
def test_without_a_step_for_each_they_lie_in_the_order_given(tmp_path: Path, checkpoints: tuple[str, str]) -> None:
    runs = [a_run(tmp_path / f"{i}", 3.0 - i, name) for i, name in enumerate(checkpoints)]
    compare(runs[::-1], tmp_path / "out")
    _, charts = curves(tmp_path / "out")
    assert charts["ssim"]["along"] == "run" and charts["ssim"]["lines"] == [[[1, "2"], [2, "3"]]]


def test_a_checkpoint_is_told_and_changes_no_hash() -> None:
    one, other = (a_record(checkpoint=f"checkpoint-{step}") for step in (1, 2))
    assert one.protocol_hash == other.protocol_hash == protocol_hash(a_record().protocol)
    assert places([Run("a", {"fvd": one}), Run("b", {"fvd": other})]) == ("step", [1, 2])
    assert Run("c", {"fvd": a_record()}).checkpoint == ""
