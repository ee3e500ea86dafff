"""`vdm data view`: the page holds the very clips and captions of the stream, and no file besides is needed."""

from __future__ import annotations

import base64
import io
import queue
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vdm.config import load
from vdm.data.dataset import ClipDataset
from vdm.data.mini_something import write_ssv2
from vdm.data.view import with_root

Command = Callable[..., Any]
TINY = Path(__file__).parents[1] / "fixtures" / "tiny.yaml"
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


class Page(HTMLParser):
    """What a page shows."""

    def __init__(self, text: str):
        super().__init__()
        self.videos: list[bytes] = []
        self.images = 0
        self.captions: list[str] = []
        self.links: list[str] = []
        self._in_caption = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        source = given.get("src") or given.get("href") or ""
        if tag == "video":
            self.videos.append(base64.b64decode(source.removeprefix("data:video/mp4;base64,")))
        if source and not source.startswith("data:"):
            self.links.append(source)
        self.images += tag == "img"
        self._in_caption = tag == "b"

    def handle_data(self, data: str) -> None:
        if self._in_caption:
            self.captions.append(data)
            self._in_caption = False


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("view") / "set"
    write_ssv2(root, num_clips=8, size=32, num_frames=10, fps=8, seed=2)
    return root


def frames_of(mp4: bytes) -> np.ndarray:
    with av.open(io.BytesIO(mp4)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def test_the_page_shows_what_the_model_sees(command: Command, clips: Path, tmp_path: Path) -> None:
    page = tmp_path / "out" / "view.html"
    overrides = ("data.height=48", "data.width=48", "data.horizontal_flip=0.5", "data.natural_captions=0.7", "seed=5",
                 "data.min_frames=2", "data.max_frames=6", "training.batch_size=3")  # fmt: skip
    result = command("vdm", "data", "view", clips, "--output", page, "--config", TINY, "--num-clips", 5, *overrides)
    assert result.code == 0 and f"wrote 5 clips to {page}" in result.out, result
    config = load(TINY, overrides)
    stream = ClipDataset(with_root(config.data, clips), split="train", seed=5, batch_size=3)
    shown = Page(page.read_text(encoding="utf-8"))
    assert shown.links == [] and shown.images == len(shown.videos) == 5
    for position, (mp4, caption) in enumerate(zip(shown.videos, shown.captions, strict=True)):
        sample = stream[position]
        assert caption == sample["caption"]
        want, have = sample["video"].permute(1, 2, 3, 0).numpy(), frames_of(mp4)
        assert have.shape == want.shape
        assert np.abs(have.astype(int) - want).mean() < 6, "but for what the codec loses"


def test_a_caption_is_text_and_not_code(command: Command, clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, file in enumerate(sorted(clips.rglob("*.mp4"))[:3]):
        shutil.copy(file, folder / f"{i}.mp4")
        (folder / f"{i}.txt").write_text("<script>alert(1)</script> & more")
    page = tmp_path / "view.html"
    assert (
        command(
            "vdm", "data", "view", folder, "--output", page, "--num_clips", 2, "data.height=32", "data.width=32"
        ).code
        == 0
    )
    text = page.read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("PLACE/nowhere --output PLACE/o.html", "data folder .*nowhere does not exist"),
        ("CLIPS", "arguments are required: --output"),
        ("CLIPS --output PLACE/o.html --num_clips 0", "--num_clips must be 1 to 1000"),
        ("CLIPS --output PLACE/o.html data.hight=3", "unknown key data.hight; did you mean"),
        ("CLIPS --output PLACE/file/o.html data.height=32 data.width=32 data.max_frames=16 --num_clips 1",
         "cannot write .*; choose another --"),
        ("PLACE/no.jsonl --output PLACE/o.html", "data list .*no.jsonl does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    command: Command, clips: Path, tmp_path: Path, arguments: str, sentence: str
) -> None:
    (tmp_path / "file").write_text("")
    words = arguments.replace("PLACE", str(tmp_path)).replace("CLIPS", str(clips)).split()
    error = command("vdm", "data", "view", *words).error
    assert re.search(sentence, error), error
    assert not (tmp_path / "o.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_a_browser_plays_the_clips(command: Command, clips: Path, tmp_path: Path) -> None:
    """A script plays the first clip to its end, and tells a server what came of it."""
    page = tmp_path / "view.html"
    size = ("data.height=64", "data.width=64", "data.min_frames=8", "data.max_frames=8")
    assert command("vdm", "data", "view", clips, "--output", page, "--num_clips", 2, *size).code == 0
    script = """<script>
      const video = document.querySelector("video"), say = text => fetch("/said/" + text);
      video.addEventListener("ended", () => say(`played/${video.videoWidth}/${video.currentTime}`));
      video.loop = false; video.play().catch(error => say(`failed/${error.name}/0`));
    </script></body>"""
    text = page.read_text(encoding="utf-8").replace("</body>", script).encode()
    said: queue.Queue[str] = queue.Queue()

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/said/"):
                said.put(self.path.removeprefix("/said/"))
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(b"" if self.path.startswith("/said/") else text)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert BROWSER is not None
    browser = subprocess.Popen(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required",
         "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", f"http://127.0.0.1:{server.server_port}/"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        outcome, width, seconds = said.get(timeout=60).split("/")
    finally:
        browser.kill()
        browser.wait()
        server.shutdown()
    assert (outcome, width) == ("played", "64") and float(seconds) == pytest.approx(1.0, abs=0.2)
