"""How the demo model follows prompts with fewer steps, other samplers and guidance: `python benchmarks/demo_table.py`.

Some prompts of each action, the same noise in every row, judged as `benchmarks/demo.py` does.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import environment, write_json
from benchmarks.demo import SCORES, Real, judge_generated, manifest_hash
from vdm.cli import Parser, run
from vdm.components import SHIPPED
from vdm.errors import UserError
from vdm.generate import pick_device
from vdm.pipeline import TextToVideo

STEPS = (
    ("ddim", 5),
    ("ddim", 10),
    ("ddim", 20),
    ("ddim", 50),
    ("dpmpp", 5),
    ("dpmpp", 10),
    ("dpmpp", 20),
    ("ddpm", 50),
)
GUIDANCE = (1.0, 2.0, 5.0, 8.0)  # beside the model's own; with dpmpp in 20 steps


def settings() -> Iterator[dict[str, Any]]:
    """What is varied, row by row; null is the model's own."""
    yield from (
        {"sampler": name, "steps": steps, "guidance_scale": None, "other_words": False} for name, steps in STEPS
    )
    short = {"sampler": "dpmpp", "steps": 20}
    yield from ({**short, "guidance_scale": scale, "other_words": False} for scale in GUIDANCE)
    yield {**short, "guidance_scale": None, "other_words": True}


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of Markdown."""
    titles = ("sampler", "steps", "guidance", "words", *SCORES, "toy-FVD")
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for row in rows:
        cells = [
            row["sampler"],
            str(row["steps"]),
            f"{row['guidance_scale']:g}",
            "other" if row["other_words"] else "captions'",
        ]
        cells += ["{right} of {clips}".format(**row[name]) for name in SCORES]
        cells.append(f"{row['fvd_toy']['value']:.1f}")
        yield f"| {' | '.join(cells)} |"


def command(arguments: Sequence[str]) -> None:
    parser = Parser(prog="benchmarks/demo_table.py", description=str(__doc__).split("\n")[0])
    parser.flag("--checkpoint", type=Path, metavar="DIR", help="a checkpoint folder; the shipped demo model by default")
    parser.flag("--clips_per_action", type=int, default=6, metavar="N", help="of each of the 16 actions (default 6)")
    parser.flag("--seed", type=int, default=6, metavar="N", help="of the prompts and the noise (default 6)")
    parser.flag("--json", type=Path, metavar="FILE", help="write the table, after every row")
    parser.flag("--device", metavar="D", help="cpu, cuda, cuda:1 ...; a GPU by default where there is one")
    options = parser.parse_args(arguments)
    if options.clips_per_action < 1 or options.seed < 0:
        raise UserError("--clips_per_action must be at least 1, and --seed at least 0")
    device = pick_device(options.device)
    record = {"environment": environment(device), "manifest_sha256": manifest_hash(options.checkpoint or SHIPPED)}
    pipe = TextToVideo.from_pretrained(options.checkpoint).to(device)
    real = Real(options.clips_per_action, seed=options.seed, data=pipe.config.data)
    rows: list[dict[str, Any]] = []
    for chosen in settings():
        asked = Namespace(**chosen, clips_per_action=options.clips_per_action, seed=options.seed)
        scores = judge_generated(pipe, asked, real=real)
        if chosen["guidance_scale"] is None:
            chosen["guidance_scale"] = pipe.config.sampling.guidance_scale
        rows.append(chosen | {name: scores[name] for name in (*SCORES, "fvd_toy")})
        print(list(table(rows))[-1], flush=True)
        if options.json:
            write_json(options.json, record | {"rows": rows})


if __name__ == "__main__":
    raise SystemExit(run(command))
