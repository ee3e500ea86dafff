"""The commands: parse, call, exit code. Bad input is one sentence and exit code 2, here and nowhere else."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from vdm.errors import Failure, UserError

GPU_NAMES = ("A100", "H100", "H200", "4090", "3090")  # in every plan
MORE_GPUS = ("A100-40", "A6000", "L40S", "4080", "4070", "3060")  # when asked for


class Parser(argparse.ArgumentParser):
    """Flags in full, spelled with `_` or `-` alike; an unknown one is a sentence like any other bad input."""

    def __init__(self, *, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def flag(self, name: str, *aliases: str, **options: object) -> None:
        """Add `--some_name`, which is also `--some-name`."""
        names = [
            spelling for one in (name, *aliases) for spelling in dict.fromkeys((one, f"--{one[2:].replace('_', '-')}"))
        ]
        self.add_argument(*names, dest=name[2:], **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


class BadClipsFound(Exception):
    """A check that went well found clips that are not: exit code 3."""


def run(command: Callable[[Sequence[str]], None]) -> int:
    """Run a command on the process's arguments; returns its exit code: 0, 2 bad input, 3 bad clips, 1 failure."""
    code = _code_of(command)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if code == 2 and os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # the main process has met the same and says it, unless torchrun stops it for this one's end
        # Threads of a process group may abort a process that leaves by the door, and with it the whole job, though all
        # its work is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _code_of(command: Callable[[Sequence[str]], None]) -> int:
    try:
        command(sys.argv[1:])
    except UserError as error:
        _tell(error)
        return 2
    except (Failure, FloatingPointError) as error:
        _tell(error)
        return 1
    except BadClipsFound:
        return 3
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    return 0


def _tell(error: Exception) -> None:
    """The one sentence; of several processes the main one says it, and torchrun says what ended the others."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).write_text(json.dumps({"message": f"error: {error}", "timestamp": int(time.time())}))


def train_command(arguments: Sequence[str]) -> None:
    """`train.py`"""
    parser = Parser(prog="train.py", description="Train the model that a config describes.")
    parser.add_argument("config", help="a YAML file, such as configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    parser.flag("--resume", metavar="latest|PATH", help="go on from the run's newest valid checkpoint, or this one")
    parser.flag("--plan", action="store_true", help="print what the run would take, and train nothing")
    told = "with --plan: for this GPU, and what to change if it does not fit"
    parser.flag("--gpu", choices=(*GPU_NAMES, *MORE_GPUS), help=told)
    parser.flag("--mfu", type=float, metavar="F", help="with --plan: share of the GPU's peak in use (default 0.4)")
    parser.flag("--json", type=Path, metavar="FILE", help="with --plan: write it there too")
    parser.flag(
        "--verify_resume", action="store_true", help="train a few steps with and without a restart, and compare"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.plan:
        _plan_command(options)
        return
    for name in ("gpu", "mfu", "json"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is for --plan; give that too, or leave it out")
    if options.verify_resume and options.resume is not None:
        raise UserError("--verify_resume trains from the start, in folders of its own; leave --resume out")
    from vdm.config import load  # after parsing: --help answers at once
    from vdm.training.loop import train
    from vdm.training.verify import verify_resume

    config = load(options.config, options.overrides)
    if options.verify_resume:
        verify_resume(config)
    else:
        train(config, resume=options.resume)


def _plan_command(options: argparse.Namespace) -> None:
    if options.resume is not None or options.verify_resume:
        raise UserError("--plan trains nothing; leave --resume and --verify_resume out")
    mfu = 0.4 if options.mfu is None else options.mfu
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu must be above 0 and at most 1, got {mfu}")

    import torch

    from vdm.advice import make_plan
    from vdm.config import load
    from vdm.files import replacing
    from vdm.plan import as_json
    from vdm.plan_table import table
    from vdm.training.environment import describe

    config = load(options.config, options.overrides)
    names = GPU_NAMES if options.gpu is None else (options.gpu,)
    plan = make_plan(config, names=names, mfu=mfu, advise=options.gpu is not None)
    if options.json is not None:
        record = {"environment": describe(torch.device("cpu")), **as_json(plan, names)}
        with replacing(options.json) as file:
            file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(plan, names))


def sample_command(arguments: Sequence[str]) -> None:
    """`sample.py`"""
    parser = _sample_parser()
    options = vars(parser.parse_intermixed_args(arguments))
    options["overrides"] = tuple(options["overrides"])
    for name, of in {"lora_scale": "lora_path", "strength": "init_video"}.items():
        if options[name] is None:
            del options[name]
        elif options[of] is None:
            raise UserError(f"--{name} is that of --{of}; give both, or neither")

    from vdm.generate import PROMPTS, SHEET_CLIPS, Request, generate, read_prompts

    texts, file = options.pop("prompt"), options.pop("prompt_file")
    if texts is not None and file is not None:
        raise UserError("give --prompt or --prompt_file, not both")
    prompts = read_prompts(file) if file is not None else tuple(texts) if texts is not None else PROMPTS
    files = generate(Request(prompts=prompts, **options))
    sheet = "contact_sheet.png" + (f" (of the first {SHEET_CLIPS})" if len(files) > SHEET_CLIPS else "")
    print(f"wrote {len(files)} clips, samples.jsonl and {sheet} to {files[0].parent}")


def _sample_parser() -> Parser:
    parser = Parser(prog="sample.py", description="Make clips from prompts; the checkpoint says what is not given.")
    parser.add_argument(
        "overrides", nargs="*", metavar="sampling.key=value", help="what has no flag, such as sampling.vae_tile=32"
    )
    parser.flag("--checkpoint", type=Path, metavar="DIR", help="a model folder: vdm, diffusers or ModelScope")
    parser.flag("--prompt", action="append", metavar="TEXT", help="may be repeated; a few built-in prompts by default")
    parser.flag("--prompt_file", type=Path, metavar="FILE", help="one prompt a line")
    parser.flag("--negative_prompt", metavar="TEXT", help="what to steer away from")
    parser.flag("--steps", "--num_inference_steps", type=int, metavar="N", help="denoising steps")
    parser.flag("--sampler", choices=("ddim", "ddpm", "dpmpp"), help="dpmpp needs the fewest steps: about 20")
    parser.flag("--eta", type=float, metavar="F", help="randomness of ddim, 0 to 1")
    parser.flag("--guidance_scale", type=float, metavar="F", help="up to 1 is without guidance")
    for name in ("num_frames", "height", "width"):
        parser.flag(f"--{name}", type=int, metavar="N", help="of each clip")
    parser.flag("--fps", type=float, metavar="N", help="frame rate of the files")
    parser.flag("--seed", type=int, default=0, metavar="N", help="of the first clip; clip i has seed + i (default 0)")
    parser.flag("--num_videos_per_prompt", type=int, default=1, metavar="N", help="clips of each prompt (default 1)")
    parser.flag("--batch_size", type=int, default=4, metavar="N", help="clips at a time (default 4)")
    parser.flag("--lora_path", type=Path, metavar="DIR", help="a LoRA to merge: a folder or a .safetensors file")
    parser.flag("--lora_scale", type=float, metavar="F", help="how strongly (default 1)")
    parser.flag("--init_video", "--init_image", type=Path, metavar="FILE", help="what to start from in place of noise")
    parser.flag("--strength", type=float, metavar="F", help="share of the steps taken from there (default 0.6)")
    parser.flag(
        "--output_dir", type=Path, default=Path("results/samples"), metavar="DIR", help="default: results/samples"
    )
    parser.flag("--device", metavar="D", help="cpu, cuda, cuda:1 ...; a GPU by default where there is one")
    parser.flag("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of UNet and VAE (default fp32)")
    return parser


COMMANDS = (
    "the commands of vdm: data synth|check|view|cache, convert, evaluate, report, replay (train.py trains, sample.py "
    "samples)"
)


def vdm_command(arguments: Sequence[str]) -> None:
    """`vdm` and `python -m vdm`"""
    parser = Parser(prog="vdm", description=COMMANDS)
    commands = {
        "convert": _convert_command,
        "data": _data_command,
        "evaluate": _evaluate_command,
        "report": _report_command,
        "replay": _replay_command,
    }
    parser.add_argument("command", choices=tuple(commands), help="each has a --help of its own")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="see vdm data synth --help, vdm convert --help")
    options = parser.parse_args(arguments)
    commands[options.command](options.rest)


def _report_command(arguments: Sequence[str]) -> None:
    parser = Parser(prog="vdm report", description="Write one page about a run: curves, previews, config, environment.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, such as runs/smoke")
    parser.flag("--output", type=Path, metavar="FILE.html", help="the page (default: RUN/report.html)")
    options = parser.parse_args(arguments)

    from vdm.report import write_report

    print(f"wrote {write_report(options.run, options.output)}; open it in a browser")


def _replay_command(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="vdm replay", description="Compute again, clip by clip, the step for which a run was given up."
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder replay-<step> of the run")
    told = "values in place of the run's, such as training.mixed_precision=no"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=told)
    parser.flag("--device", metavar="D", help="cpu, cuda, cuda:1 ...; a GPU by default where there is one")
    options = parser.parse_intermixed_args(arguments)

    from vdm.generate import pick_device
    from vdm.training.replaying import replay

    tried = replay(options.bundle, options.overrides, device=pick_device(options.device))
    print(*tried, sep="\n")
    if any(one.module for one in tried):
        raise BadClipsFound


def _evaluate_command(arguments: Sequence[str]) -> None:
    from vdm.evaluation.command import evaluate_command

    evaluate_command(arguments)


def _convert_command(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="vdm convert", description="Write a model folder in another layout; every tensor is accounted for."
    )
    parser.add_argument(
        "source", type=Path, help="vdm, diffusers or ModelScope folder; or Stable Diffusion 2's, to start from"
    )
    parser.add_argument("target", type=Path, help="a folder that is not there yet, or is empty")
    parser.flag("--to", choices=("vdm", "diffusers", "modelscope"), required=True, help="the layout to write")
    parser.flag("--variant", metavar="NAME", help="which files of a diffusers folder to read, such as fp16")
    parser.flag("--dtype", choices=("fp32", "fp16", "bf16"), help="of the numbers written; as they are by default")
    parser.flag("--allow_missing", action="append", default=[], metavar="NAME", help="a tensor to have new; * fits all")
    parser.flag(
        "--allow_unexpected", action="append", default=[], metavar="NAME", help="a tensor to leave out; * fits all"
    )
    options = parser.parse_args(arguments)

    from vdm.generate import DTYPES
    from vdm.interop.convert import convert
    from vdm.interop.links import Allowed

    convert(
        options.source,
        options.target,
        to=options.to,
        variant=options.variant,
        dtype=None if options.dtype is None else DTYPES[options.dtype],
        allowed=Allowed(missing=tuple(options.allow_missing), unexpected=tuple(options.allow_unexpected)),
    )


def _data_command(arguments: Sequence[str]) -> None:
    from vdm.data_commands import data_command

    data_command(arguments)


def main() -> int:
    """Console command `vdm`."""
    return run(vdm_command)
