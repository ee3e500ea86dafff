"""At which noise a model goes wrong, on a tiny one."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from benchmarks import demo_stages
from benchmarks.demo import rendered
from vdm.components import SHIPPED
from vdm.data.video import to_float, to_video
from vdm.errors import UserError
from vdm.pipeline import TextToVideo


@pytest.fixture(scope="module")
def pipe() -> TextToVideo:
    return TextToVideo.from_pretrained(SHIPPED)


def test_the_less_noise_the_nearer_to_the_clip(pipe: TextToVideo) -> None:
    clips = list(islice(rendered(0, actions=["move_down", "cover"], seed=0, data=pipe.config.data), 2))
    shown, little = demo_stages.denoised(pipe, clips, level=0.02, steps=50)
    assert shown.shape == (2, 3, 16, 64, 64)
    _, more = demo_stages.denoised(pipe, clips, level=0.1, steps=50)
    assert (little < more).all()
    wanted = torch.stack([to_float(to_video(clip.frames)) for clip in clips])
    assert (shown.clamp(-1, 1) - wanted).square().mean() < 0.01  # of a squared range of 4: the clips themselves


def test_clips_are_denoised_by_the_network_at_hand(pipe: TextToVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle that knows the clip gives it back from pure noise."""
    clips = list(islice(rendered(0, actions=["cover"], seed=0, data=pipe.config.data), 1))
    z = pipe.vae.encode(to_float(to_video(clips[0].frames))[None]).mode()
    monkeypatch.setattr(pipe.unet, "forward", lambda x, t, context: z.expand(len(context), *z.shape[1:]))
    _, errors = demo_stages.denoised(pipe, clips, level=1.0, steps=5)
    assert errors.max() < 1e-10


def test_the_command_writes_a_row_for_every_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_stages, "TEMPLATES", {"move_down": "", "cover": ""})
    file = tmp_path / "stages.json"
    demo_stages.command(["--clips_per_action", "1", "--levels", "0.02", "0.06", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["level"] for row in rows] == [0.02, 0.06] and rows[0]["latent_mse"] < rows[1]["latent_mse"]
    assert capsys.readouterr().out.count("latent MSE") == 2


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--clips_per_action", "0"], "--clips_per_action must be at least 1"),
        (["--levels", "0"], "--levels above 0"),
        (["--levels", "0.01"], "none of 50 steps is below 0.01"),
    ],
)
def test_impossible_requests(wrong: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        demo_stages.command(["--clips_per_action", "1", *wrong])
