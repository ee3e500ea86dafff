"""Train a model: python train.py CONFIG.yaml [section.key=value ...] [--resume latest|PATH]."""

from vdm.cli import run, train_command

if __name__ == "__main__":
    raise SystemExit(run(train_command))
