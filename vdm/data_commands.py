"""`vdm data`: make, check, look at and encode clips."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vdm.cli import BadClipsFound, Parser
from vdm.errors import UserError

USAGE = """usage: vdm data COMMAND ...

commands, each with its own --help:
  synth  write mini-something as a folder in SSv2 layout
  check  decode every clip of a data set once, and say what is wrong
  view   write a page with the clips and captions that a model will see
  cache  encode every clip and caption of a run once"""
ROOT_HELP = "a folder in SSv2 layout, or of videos with a .txt beside each, or of .tar shards; a .jsonl, .csv or .tar"


def data_command(arguments: Sequence[str]) -> None:
    """`vdm data`"""
    action, rest = (arguments[0], arguments[1:]) if arguments else (None, ())
    commands = {"synth": _synth_command, "check": _check_command, "view": _view_command, "cache": _cache_command}
    if action in ("-h", "--help"):
        print(USAGE)
    elif action is not None and action in commands:
        commands[action](rest)
    else:
        raise UserError(
            f"vdm data needs a command: synth, check, view or cache, and got {action!r}; see vdm data --help"
        )


def _synth_command(arguments: Sequence[str]) -> None:
    parser = Parser(prog="vdm data synth", description="Write mini-something as a folder in SSv2 layout.")
    parser.add_argument("out", type=Path, help="a folder that is not there yet, or is empty")
    parser.flag("--num_clips", type=int, required=True, metavar="N", help="training and validation clips together")
    parser.flag("--size", type=int, default=64, metavar="N", help="height and width in pixels (default 64)")
    parser.flag("--num_frames", type=int, default=16, metavar="N", help="of each clip (default 16)")
    parser.flag("--fps", type=float, default=8.0, metavar="N", help="frame rate (default 8)")
    parser.flag("--seed", type=int, default=0, metavar="N", help="another seed, other clips (default 0)")
    options = parser.parse_args(arguments)

    from vdm.data.mini_something import write_ssv2

    write_ssv2(
        options.out,
        num_clips=options.num_clips,
        size=options.size,
        num_frames=options.num_frames,
        fps=options.fps,
        seed=options.seed,
    )
    print(
        f"wrote {options.num_clips} clips to {options.out}; train on them with data.format=ssv2 data.root={options.out}"
    )


def _check_command(arguments: Sequence[str]) -> None:
    parser = Parser(prog="vdm data check", description="Decode every clip of a data set once, and say what is wrong.")
    parser.add_argument("root", metavar="DIR", help=ROOT_HELP)
    parser.flag("--json", type=Path, metavar="FILE", help="write one record a clip")
    parser.flag("--num_workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.flag("--time_limit", type=float, default=120.0, metavar="F", help="seconds for a clip (default 120)")
    options = parser.parse_args(arguments)
    if options.num_workers is not None and options.num_workers < 1:
        raise UserError(f"--num_workers must be at least 1, got {options.num_workers}")
    if not 0 < options.time_limit <= 1e6:
        raise UserError(f"--time_limit must be above 0, and at most 1e6 seconds, got {options.time_limit}")

    from vdm.data.check import check, claim, table, write_report

    if options.json is not None:
        claim(options.json)
    checked = check(options.root, num_workers=options.num_workers, time_limit=options.time_limit)
    if options.json is not None:
        write_report(options.json, checked)
    sys.stdout.write(table(checked).encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
    if any(one.bad for one in checked):
        raise BadClipsFound


def _view_command(arguments: Sequence[str]) -> None:
    parser = Parser(prog="vdm data view", description="Write a page with the clips and captions that a model will see.")
    parser.add_argument("root", help=ROOT_HELP)
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="values of the data section")
    parser.flag("--output", type=Path, required=True, metavar="OUT.html", help="the page, which needs no other file")
    parser.flag(
        "--config", type=Path, metavar="CONFIG.yaml", help="a run's config: its data section, seed and clips a step"
    )
    parser.flag("--num_clips", type=int, default=24, metavar="N", help="of the stream of training clips (default 24)")
    options = parser.parse_intermixed_args(arguments)
    if not 1 <= options.num_clips <= 1000:
        raise UserError(f"--num_clips must be 1 to 1000, or no browser opens the page; got {options.num_clips}")

    from vdm.config import Config, load, override
    from vdm.data.view import with_root, write_page

    config = load(options.config, options.overrides) if options.config else override(Config("view"), options.overrides)
    data = with_root(config.data, options.root)
    run = config.training
    count = write_page(
        data,
        options.output,
        num_clips=options.num_clips,
        seed=config.seed,
        batch_size=run.batch_size * run.gradient_accumulation_steps * (run.num_gpus or 1),
    )
    print(f"wrote {count} clips to {options.output}; open it in a browser")


def _cache_command(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="vdm data cache", description="Encode every clip and caption of a run once; started again, it goes on."
    )
    parser.add_argument("config", help="a YAML file, such as configs/a100.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    parser.flag("--dtype", choices=("fp32", "fp16", "bf16"), default="fp16", help="of the numbers kept (default fp16)")
    parser.flag("--device", metavar="D", help="cpu, cuda, cuda:1 ...; a GPU by default where there is one")
    options = parser.parse_intermixed_args(arguments)

    from vdm.config import load
    from vdm.generate import DTYPES, pick_device
    from vdm.precompute import write_cache

    config = load(options.config, options.overrides)
    folder = Path(config.data.cache_dir or f"cache/{config.name}")
    write_cache(config, folder, dtype=DTYPES[options.dtype], device=pick_device(options.device))
    print(f"wrote {folder}; train from it with data.cache_dir={folder}")
