"""Make clips from prompts: python sample.py [--checkpoint DIR] [--prompt TEXT ...] [--steps 50]; see --help."""

from vdm.cli import run, sample_command

if __name__ == "__main__":
    raise SystemExit(run(sample_command))
