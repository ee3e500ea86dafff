"""`vdm report`: the page holds every curve, clip and setting of a run, however that fared, and needs no other file."""

from __future__ import annotations

import base64
import json
import queue
import re
import shutil
import subprocess
import threading
import urllib.parse
from collections.abc import Callable
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vdm.checkpoint import RunLock
from vdm.config import load, to_yaml
from vdm.data.video import write_video
from vdm.report import MOST_CLIPS, MOST_STEPS, evenly, warnings, write_report
from vdm.rundir import read_run

Command = Callable[..., Any]
TINY = Path(__file__).parent / "fixtures" / "tiny.yaml"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "img", "br", "input"}
NASTY = '<script>alert(1)</script> & "more"'


class Page(HTMLParser):
    """What a page shows; fails where tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.videos: list[bytes] = []
        self.curves: list[str] = []
        self.points: list[int] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        source = given.get("src") or given.get("href") or ""
        if tag == "video":
            self.videos.append(base64.b64decode(source.removeprefix("data:video/mp4;base64,")))
        if source and not source.startswith("data:"):
            self.links.append(source)
        if given.get("data-curves"):
            self.points += [len(line) for line in json.loads(given["data-curves"] or "")["lines"]]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["span"] and data.strip():
            self.curves.append(data.strip())
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data + "\n"


def a_run(
    folder: Path, *, records: int = 4, previews: int = 2, clips: int = 2, overrides: tuple[str, ...] = ()
) -> Path:
    """A run folder by hand."""
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(load(TINY, [f"run_dir={folder}", "name=my-run", *overrides])))
    lines = [
        {"step": step, "loss": 1.0 / step, "lr": 1e-4, "temporal_gain": 0.01, "temporal_gain_error": 0.001, "odd": 2.0}
        for step in range(1, records + 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in range(previews):
        place = folder / "samples" / f"step-{step:06d}"
        place.mkdir(parents=True)
        for number in range(clips):
            (place / f"{number:02d}.mp4").write_bytes(f"clip {step}/{number}".encode())
        (place / "captions.json").write_text(json.dumps([NASTY, *(f"caption {n}" for n in range(1, clips))]))
    return folder


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


# ---- a run as it should be


def test_every_curve_and_clip_is_in_the_page(command: Command, tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    (folder / "environment.json").write_text(json.dumps([{"command": f"train.py {NASTY}", "torch": "9.9", "step": 0}]))
    output = tmp_path / "new" / "page.html"
    result = command("vdm", "report", folder, "--output", output)
    assert result.code == 0 and f"wrote {output}" in result.out
    assert not (folder / "report.html").exists()
    text = output.read_text(encoding="utf-8")
    page = Page(text)
    assert sorted(page.curves) == ["loss", "lr", "odd", "temporal_gain"], "an error is a band, not a curve"
    assert page.points == [4] * 4 and text.count("<polygon") == 1
    assert page.videos == [b"clip 0/0", b"clip 1/0", b"clip 0/1", b"clip 1/1"], "a row a clip, a column a step"
    assert page.links == [] and "http" not in text
    assert text.count("<script") == 1 and page.text.count(NASTY) == 2, "captions are text and not code"
    for shown in ("my-run", "stopped, step 4 of 20", "step 0", "9.9", "adam_beta2: 0.999", "training.learning_rate"):
        assert shown in page.text
    assert "not 0.0001" in page.text, "the default of the learning rate"
    changed = page.text[page.text.index("Other than the defaults") : page.text.index("All of it")]
    assert "training.weight_decay" not in changed


@pytest.mark.parametrize(("total", "count", "chosen"), [(3, 8, [0, 1, 2]), (9, 3, [0, 4, 8]), (5, 1, [0])])
def test_of_many_steps_some_are_taken_evenly(total: int, count: int, chosen: list[int]) -> None:
    assert evenly(range(total), count) == chosen


def test_the_page_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_run(tmp_path / "run", previews=20, clips=10, records=1)
    page = page_of(folder)
    assert len(page.videos) == MOST_STEPS * MOST_CLIPS
    assert page.videos[0] == b"clip 0/0" and page.videos[MOST_STEPS - 1] == b"clip 19/0"
    assert "8 of 20 previews, 8 of 10 clips" in page.text
    monkeypatch.setattr("vdm.report.MOST_BYTES", 4 * MOST_CLIPS * len(b"clip 0/0"))
    assert len(page_of(folder).videos) == 3 * MOST_CLIPS, "the steps above nine take a byte more"


# ---- how a run fared


def test_the_state_of_a_run(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    assert read_run(folder).status == "stopped"
    with RunLock(folder):
        assert read_run(folder).status == "running"
    assert read_run(folder).status == "stopped"
    (folder / "final").mkdir()
    (folder / "final" / "manifest.json").write_text("{}")
    assert read_run(folder).status == "finished"


def test_to_look_at_a_run_is_not_to_hold_it(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    with RunLock(folder):
        page_of(folder)
    with RunLock(folder):
        pass


@pytest.mark.parametrize(
    "more",
    ['{"step": 5, "lo', "null", "[1]", '{"step": "x", "loss": 1}', '{"loss": 1}', "\x00\x00", "\udc80", ""],
)
def test_damaged_lines_are_left_out(tmp_path: Path, more: str) -> None:
    folder = a_run(tmp_path / "run")
    with (folder / "log.jsonl").open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(more)
    assert [record["step"] for record in read_run(folder).records] == [1, 2, 3, 4]
    assert "step 4 of 20" in page_of(folder).text


def test_what_is_not_finite_is_left_out_and_said(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": null, "lr": NaN, "skipped_steps": 2}\n{"step": 2, "loss": 7.0}\n')
    page = page_of(folder)
    assert "loss of step 5 is not finite" in page.text and "2 steps were skipped" in page.text
    assert read_run(folder).records[1] == {"step": 2, "loss": 7.0}, "of two lines of one step the later counts"


def test_alarms_that_stand_are_on_top(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", overrides=("training.max_train_steps=1000",))
    assert warnings(read_run(folder)) == []
    lines = [
        {"step": 300, "loss": 1.0, "temporal_gain": 0.0, "temporal_gain_error": 0.1},
        {"step": 400, "loss": 1.0, "caption_gain": 0.0, "caption_gain_error": 0.1, "motion_ratio": 0.01},
        {"step": 500, "loss": 1.0, "caption_gain": 0.5, "caption_gain_error": 0.1},
    ]
    with (folder / "log.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    found = warnings(read_run(folder))
    assert [re.match(r"step (\d+): alarm: (\w+)", one).groups() for one in found] == [  # type: ignore[union-attr]
        ("300", "temporal_gain"),
        ("400", "previews"),
    ]
    assert "step 300: alarm: temporal_gain" in page_of(folder).text


def test_a_run_that_hours_end_is_judged_by_the_steps_it_had(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", overrides=("training.max_train_steps=100000", "training.max_train_hours=1.5"))
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2000, "loss": 1.0, "temporal_gain": 0.0, "temporal_gain_error": 0.1}) + "\n")
    assert "step 2000 of 100000 at most or 1.5 hours" in page_of(folder).text
    assert warnings(read_run(folder)) == [], "it may be in its first tenth"
    (folder / "final").mkdir()
    (folder / "final" / "manifest.json").write_text("{}")
    assert len(warnings(read_run(folder))) == 1


@pytest.mark.parametrize("damage", ["config", "no config", "captions", "no clips", "environment", "no lines"])
def test_files_that_are_damaged_or_gone_cost_their_part_alone(tmp_path: Path, damage: str) -> None:
    folder = a_run(tmp_path / "run")
    if damage == "config":
        (folder / "config.yaml").write_text("training:\n  bach_size: 2\n")
    elif damage == "no config":
        (folder / "config.yaml").unlink()
    elif damage == "captions":
        (folder / "samples" / "step-000001" / "captions.json").write_text('["half')
    elif damage == "no clips":
        for file in (folder / "samples").rglob("*.mp4"):
            file.unlink()
    elif damage == "environment":
        (folder / "environment.json").write_text("[{")
    else:
        (folder / "log.jsonl").write_text("")
    page = page_of(folder)
    assert (page.curves == []) is (damage == "no lines")
    assert (page.videos == []) is (damage == "no clips")
    assert ("clip 0" in page.text) is (damage == "captions")
    assert ("bach_size" in page.text) is (damage == "config")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_a_browser_shows_the_numbers_under_the_pointer_and_plays_all_clips_at_once(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    for file in (folder / "samples").rglob("*.mp4"):
        write_video(file, np.zeros((16, 32, 32, 3), dtype=np.uint8), fps=8.0)
    script = """<script>
      const svg = document.querySelector(".chart svg"), box = svg.getBoundingClientRect();
      const point = x => svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + x * box.width }));
      const told = () => document.querySelector(".chart figcaption").textContent.trim();
      point(0.55); const middle = told(); point(1); const end = told();
      svg.dispatchEvent(new PointerEvent("pointerleave")); const away = told();
      setTimeout(() => {
        const times = clips.map(clip => clip.currentTime);
        const apart = Math.max(...times) - Math.min(...times), moved = Math.min(...times) > 0;
        fetch(encodeURIComponent([middle, end, away, clips.length, moved && apart < 0.3].join("|")));
      }, 1500);
    </script></body>"""
    page = write_report(folder).read_text(encoding="utf-8").replace("</body>", script).encode()
    said: queue.Queue[str] = queue.Queue()

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if len(self.path) > 20:
                said.put(urllib.parse.unquote(self.path[1:]))
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page if self.path == "/" else b"")

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [
        *(str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--autoplay-policy=no-user-gesture-required", f"--user-data-dir={tmp_path / 'profile'}"),
        f"http://127.0.0.1:{server.server_port}/",
    ]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        told = said.get(timeout=60).split("|")
    finally:
        browser.kill()
        browser.wait()
        server.shutdown()
    assert told == ["Loss at step 2 loss 0.5", "Loss at step 4 loss 0.25", "Loss loss 0.25", "4", "true"]


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("PLACE/run --output PLACE/run/log.jsonl/page.html", "cannot write .*page.html.*; choose another --output"),
        ("PLACE/run --outptu x.html", "unrecognized arguments: --outptu"),
        ("PLACE/run PLACE/run", "unrecognized arguments"),
        ("PLACE", "is not of a run, for it holds no log.jsonl"),
    ],
)
def test_bad_input_is_one_sentence(command: Command, tmp_path: Path, arguments: str, sentence: str) -> None:
    a_run(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    assert re.search(sentence, command("vdm", "report", *arguments.replace("PLACE", str(tmp_path)).split()).error)
    assert sorted(tmp_path.rglob("*")) == before
