"""`vdm report`: one page about a run, with its curves, previews, config and environment, which needs no other file."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from vdm import charts
from vdm.charts import Curve, chart
from vdm.config import Config
from vdm.rundir import Preview, Record, Run, read_run
from vdm.training.diagnostics import ERROR, NUM_BINS, alarms
from vdm.training.settings import TrainingConfig
from vdm.webpage import video, write_page

T = TypeVar("T")
MOST_STEPS, MOST_CLIPS = 8, 8  # of previews that are shown
MOST_BYTES = 30_000_000  # of their files together
EARLIER = ("started", "step", "command")  # what is told of starts before the last
QUARTERS = ("least noise", "second quarter", "third quarter", "most noise")
# Title, then the curves, as regular expressions. What the log holds beyond them has a chart of its own.
CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Loss", ("loss", "val_loss")),
    *((f"Loss by time step: {QUARTERS[b]}", (f"loss_t{b}", f"val_loss_t{b}")) for b in range(NUM_BINS)),
    ("Gain from the order of frames, and from captions", ("temporal_gain", "caption_gain")),
    ("Motion of previews and of clips", ("preview_motion", "data_motion")),
    ("Motion of previews, of that of clips", ("motion_ratio",)),
    ("Norm of gradients", ("grad_norm", "grad_norm_.*")),
    ("Learning rate", ("lr", "lr_.*")),
    ("Clips a second", ("videos_per_second",)),
    ("Seconds a step", ("seconds_per_step",)),
    ("Share of the time spent waiting for data", ("data_wait_share",)),
    ("Operations, TFLOP/s", ("tflops",)),
    ("Share of what the device can do (MFU)", ("mfu",)),
    ("Most memory so far, GB", ("peak_memory_gb", "peak_rss_gb")),
)
STYLE = """
body { max-width: 1600px } h2 { margin-top: 1.6em } .alarm { color: #a4262c; font-weight: 600 }
.previews { overflow-x: auto } .previews video { width: 160px; display: block } .previews th { font-weight: 400 }
.previews td, .previews th { padding: 3px; text-align: left; vertical-align: top; max-width: 170px }
table.plain td, table.plain th { padding: 2px 1.2em 2px 0; text-align: left; vertical-align: top }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12px }
"""
SCRIPT = """
const clips = [...document.querySelectorAll(".previews video")];
const restart = () => clips.forEach(clip => { clip.currentTime = 0; clip.play().catch(() => {}); });
if (clips.length) {
  const longest = () => clips.reduce((a, b) => (b.duration || 0) > (a.duration || 0) ? b : a);
  clips.forEach(clip => clip.addEventListener("ended", () => { if (clip === longest()) restart(); }));
  document.querySelector("#play").addEventListener("click", () => {
    if (clips.some(clip => !clip.paused)) clips.forEach(clip => clip.pause()); else restart();
  });
  addEventListener("load", restart);
}
"""


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the page, by default as `report.html` in the run's folder; returns its file.

    The file appears whole or not at all. Raises UserError where `run_dir` is not a run's folder.
    """
    run = read_run(run_dir)
    output = run_dir / "report.html" if output is None else output
    name = run.config.name if run.config is not None else run.folder.resolve().name
    styles, script = f"{charts.STYLE}{STYLE}", f"{charts.SCRIPT}{SCRIPT}"
    return write_page(output, name, _body(run, name), style=styles, script=script, remedy="choose another --output")


def _body(run: Run, name: str) -> str:
    parts = [
        f"<h1>{html.escape(name)}</h1>\n<p>{html.escape(_state(run))}</p>\n",
        *(f'<p class="alarm">{html.escape(sentence)}</p>\n' for sentence in warnings(run)),
        _section("Curves", "".join(_charts(run.records)), "charts"),
        _section("Previews", _previews(run.previews), "previews"),
        _section("Environment", _starts(run.starts), "starts"),
        _section("Config", _config(run), "config"),
    ]
    return "".join(parts)


def _section(title: str, content: str, kind: str) -> str:
    return f'<h2>{title}</h2>\n<div class="{kind}">\n{content or "none yet"}</div>\n'


def _state(run: Run) -> str:
    """Where the run stands, in a line."""
    step = int(run.records[-1]["step"]) if run.records else 0
    told = [f"{run.status}, step {step}" + ("" if run.config is None else _end(run.config.training))]
    if losses := [(record["val_loss"], int(record["step"])) for record in run.records if "val_loss" in record]:
        told.append(f"best val_loss {min(losses)[0]:.4f} at step {min(losses)[1]}, last {losses[-1][0]:.4f}")
    if run.starts:
        again = f", and again {run.starts[-1].get('started')}" if len(run.starts) > 1 else ""
        told.append(f"started {run.starts[0].get('started')}{again}")
    return "; ".join(told)


def _end(training: TrainingConfig) -> str:
    """When a run ends."""
    known = {"epochs": training.max_train_epochs, "hours": training.max_train_hours}
    others = [f"{number:g} {unit}" for unit, number in known.items() if number is not None]
    return " or ".join([f" of {training.max_train_steps}" + (" at most" if others else ""), *others])


def warnings(run: Run) -> list[str]:
    """The alarms that stand, by the last record of each number, and what else asks for a look."""
    found = []
    for name in ("temporal_gain", "caption_gain", "motion_ratio"):
        last = next((record for record in reversed(run.records) if name in record), None)
        if last is not None and run.config is not None:
            values = {key: last[key] for key in (name, name + ERROR) if key in last}
            step = int(last["step"])
            found += [
                f"step {step}: {told}"
                for told in alarms(values, step=step, num_steps=_num_steps(run, run.config.training), config=run.config)
            ]
    last = run.records[-1] if run.records else {"loss": 0.0}
    if skipped := int(last.get("skipped_steps", 0)):
        found.append(
            f"{skipped} steps were skipped, for their loss or gradient was not finite; the run said which clips"
        )
    if "loss" not in last and last["step"] > 0:  # step 0 has none, being what was before the first
        found.append(f"the loss of step {last['step']} is not finite")
    return found


def _num_steps(run: Run, training: TrainingConfig) -> int:
    """How many steps a run has, or may have at most."""
    return int(run.records[-1]["step"]) if run.status == "finished" and run.records else training.max_train_steps


# ---- curves


def _charts(records: Sequence[Record]) -> Iterator[str]:
    names = list(dict.fromkeys(name for record in records for name in record))
    left = [name for name in names if name != "step" and not name.endswith(ERROR)]
    for title, patterns in CHARTS:
        chosen = [name for pattern in patterns for name in left if re.fullmatch(pattern, name)]
        left = [name for name in left if name not in chosen]
        if chosen:
            yield chart(title, [_curve(name, records) for name in chosen])
    while left:
        pair = [name for name in (left[0], f"val_{left[0]}") if name in left]
        left = [name for name in left if name not in pair]
        yield chart(pair[0], [_curve(name, records) for name in pair])


def _curve(name: str, records: Sequence[Record]) -> Curve:
    found = [record for record in records if name in record]
    errors = [record.get(name + ERROR, 0.0) for record in found]
    return Curve(
        name,
        [int(record["step"]) for record in found],
        [record[name] for record in found],
        errors if any(errors) else None,
    )


# ---- previews


def _previews(previews: Sequence[Preview]) -> str:
    """A row for each clip, a column for each step."""
    if not previews:
        return ""
    shown = _chosen(previews)
    head = "".join(f"<th>step {preview.step}</th>" for preview in shown)
    rows = []
    for number in range(min(MOST_CLIPS, max(len(preview.clips) for preview in shown))):
        cells = "".join(f"<td>{_video(preview, number)}</td>" for preview in shown)
        caption = next(preview.captions[number] for preview in reversed(shown) if number < len(preview.captions))
        rows.append(f"<tr><th>{html.escape(caption)}</th>{cells}</tr>\n")
    total = len(previews), max(len(preview.clips) for preview in previews)
    note = f"{len(shown)} of {total[0]} previews, {len(rows)} of {total[1]} clips"
    return (
        f'<p><button id="play">play or pause</button> {note}</p>\n<table>\n'
        f"<tr><th></th>{head}</tr>\n{''.join(rows)}</table>\n"
    )


def _chosen(previews: Sequence[Preview]) -> list[Preview]:
    """The first, the last, and evenly between them so many that the page does not grow too large."""
    count = min(MOST_STEPS, len(previews))
    while True:
        chosen = evenly(previews, count)
        if count <= 2 or sum(_size(clip) for preview in chosen for clip in preview.clips[:MOST_CLIPS]) <= MOST_BYTES:
            return chosen
        count -= 1


def evenly(items: Sequence[T], count: int) -> list[T]:
    """`count` of some items, their first and last among them; all where there are no more."""
    if count >= len(items) or count < 2:
        return list(items[:count])
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _video(preview: Preview, number: int) -> str:
    """A clip in the page; nothing where there is none, or it went away meanwhile."""
    if number >= len(preview.clips):
        return ""
    try:
        mp4 = preview.clips[number].read_bytes()
    except OSError:
        return ""
    return video(mp4, f'title="{html.escape(preview.captions[number])}"')


# ---- config and environment


def _starts(starts: Sequence[dict[str, object]]) -> str:
    """The last start in full, and of those before what they were called with."""
    if not starts:
        return ""
    last = starts[-1]
    before = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(start.get(key)))}</td>' for key in EARLIER)}</tr>\n"
        for start in starts[:-1]
    )
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>\n"
        for name, value in last.items()
        if value is not None
    )
    earlier = f'<h3>Earlier starts</h3>\n<table class="plain">\n{before}</table>\n' if before else ""
    return f'<table class="plain">\n{rows}</table>\n{earlier}'


def _config(run: Run) -> str:
    if not run.config_text:
        return ""
    rows = "" if run.config is None else "".join(_changed(run.config))
    table = f'<h3>Other than the defaults</h3>\n<table class="plain">\n{rows}</table>\n' if rows else ""
    return f"{table}<h3>All of it</h3>\n<pre>{html.escape(run.config_text)}</pre>\n"


def _changed(config: Config) -> Iterator[str]:
    """A row for each key whose value is not its default."""
    theirs = asdict(Config(name=config.name))
    for section, value in asdict(config).items():
        keys = value.items() if isinstance(value, dict) else [(None, value)]
        for key, ours in keys:
            default = theirs[section] if key is None else theirs[section][key]
            if ours != default:
                name = section if key is None else f"{section}.{key}"
                cells = "".join(
                    f"<td>{html.escape(json.dumps(one))}</td>" for one in (ours, f"not {json.dumps(default)}")
                )
                yield f"<tr><th>{html.escape(name)}</th>{cells}</tr>\n"
