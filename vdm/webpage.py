"""Pages of HTML that need no other file: their frame, and videos inside."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from vdm.files import replacing

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1.5em }
figure { margin: 0; border: 1px solid #ddd; border-radius: 6px; padding: .7em }
video { width: 100%; background: #000; image-rendering: pixelated }
.strip { overflow-x: auto; margin: .4em 0 } .strip img { display: block }
figcaption b { display: block; font-weight: 600 } small { color: #666 }
"""


def write_page(file: Path, title: str, body: str, *, style: str = "", script: str = "", remedy: str) -> Path:
    """Write a page of this body (HTML), which appears whole or not at all; returns `file`.

    `style` and `script` come after what all pages share. Raises CannotWrite, which ends with `remedy`.
    """
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}"
        f"{f'<script>{script}</script>' if script else ''}\n</body>\n</html>\n"
    )
    with replacing(file, remedy=remedy) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))
    return file


def video(mp4: bytes, attributes: str) -> str:
    """The element that plays a file's bytes, muted; `attributes` are HTML, such as "autoplay loop"."""
    data = base64.b64encode(mp4).decode()
    return f'<video {attributes} muted playsinline src="data:video/mp4;base64,{data}"></video>'
