"""`vdm evaluate`: parse, and measure, compare or test."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vdm.cli import Parser
from vdm.errors import Failure, UserError


def evaluate_command(arguments: Sequence[str]) -> None:
    """`vdm evaluate`"""
    parser = Parser(prog="vdm evaluate", description="Measure generated clips against real ones, and say how sure.")
    parser.flag("--generated", type=Path, metavar="DIR", help="a folder that sample.py wrote")
    parser.flag("--reference", type=Path, metavar="DIR", help="real clips: a folder in SSv2 layout")
    parser.flag("--split", choices=("all", "train", "validation"), default="all", help="of the reference (default all)")
    _options_of_protocol(parser)
    parser.flag("--metrics", metavar="a,b,...", help="which to measure; all by default, but those that lack weights")
    parser.flag("--weights_dir", type=Path, default=Path("weights"), metavar="DIR", help="weight files (weights)")
    parser.flag(
        "--output_dir", type=Path, default=Path("results/metrics"), metavar="DIR", help="default: results/metrics"
    )
    parser.flag("--selftest", action="store_true", help="check the weight files in --weights_dir, and measure nothing")
    parser.flag("--compare", type=Path, nargs="+", metavar="DIR", help="output folders of evaluate: how they differ")
    options = parser.parse_args(arguments)
    sides = {name: getattr(options, name) for name in ("generated", "reference")}
    if (options.selftest or options.compare) and (options.selftest and options.compare or any(sides.values())):
        raise UserError("--selftest, --compare and --generated with --reference are three things; ask for one")
    if options.selftest:
        _selftest(options.weights_dir)
    elif options.compare:
        from vdm.evaluation.compare import compare, table

        _tell(table(compare(options.compare, options.output_dir)))
        _tell(f"wrote compare.json and compare.html to {options.output_dir}\n")
    else:
        for name, folder in sides.items():
            if folder is None:
                raise UserError(f"vdm evaluate needs --{name} DIR; see vdm evaluate --help")
        _measure(options)


def _options_of_protocol(parser: Parser) -> None:
    """Spelled out, for to ask vdm.evaluation.options would be to import torch before a mistake is told."""
    parser.flag("--resize", choices=("squash", "crop"), default="squash", help="frames for I3D (squash)")
    parser.flag("--interp", choices=("torch", "tf1", "aa"), default="torch", help="bilinear rule for I3D (torch)")
    parser.flag(
        "--bn_eps", type=float, choices=(1e-3, 1e-5), default=1e-3,
        help="of I3D: 1e-3 as it was defined, 1e-5 as in the tables of VideoGPT, TATS and LVDM (1e-3)",
    )  # fmt: skip
    parser.flag("--cov", choices=("unbiased", "biased"), default="unbiased", help="of Frechet distances (unbiased)")
    parser.flag("--clip_resize", choices=("crop", "squash", "pad"), default="crop", help="frames for CLIP (crop)")


def _selftest(weights_dir: Path) -> None:
    from vdm.evaluation.selftest import selftest, table

    checks = selftest(weights_dir)
    print(table(checks), end="")
    if wrong := [check.file for check in checks if check.ok is False]:
        raise Failure(f"{', '.join(dict.fromkeys(wrong))} in {weights_dir} gives other values than it should")


def _measure(options: argparse.Namespace) -> None:
    from vdm.evaluate import Request, evaluate
    from vdm.evaluation.options import CHOICES, Options
    from vdm.evaluation.records import table

    named = None if options.metrics is None else [name.strip() for name in options.metrics.split(",")]
    names = None if named is None else tuple(name for name in named if name)
    fields = ("generated", "reference", "output_dir", "weights_dir", "split")
    protocol = Options(**{name: getattr(options, name) for name in CHOICES})
    records = evaluate(Request(**{name: getattr(options, name) for name in fields}, metrics=names, options=protocol))
    if records:  # only the main process has them
        _tell(table(records))
        _tell(f"wrote metrics.json, metrics.md, per_clip.jsonl and report.html to {options.output_dir}\n")
    if records and names and not any(record.ok for record in records):
        told = "; ".join(f"{record.metric} is {record.status}" for record in records)
        raise UserError(f"nothing that --metrics names could be measured: {told}")


def _tell(text: str) -> None:
    """Print, with an escape for each letter of a file's name that the terminal has not."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
