"""Replaying gives what calling does; without a GPU it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vdm.errors import UserError
from vdm.replay import Replayed


def test_without_a_gpu_there_is_nothing_to_replay() -> None:
    with pytest.raises(UserError, match="sampling.cuda_graph needs a GPU, and this is cpu; set it to false"):
        Replayed(torch.neg, torch.device("cpu"))


@pytest.mark.gpu
@torch.no_grad()
def test_a_replay_is_the_call() -> None:
    device = torch.device("cuda")
    layer = torch.nn.Linear(8, 8).to(device)

    def call(x: Tensor, shift: Tensor) -> Tensor:
        return layer(x) + shift

    replayed: Callable[..., Tensor] = Replayed(call, device)
    inputs = [(torch.randn(rows, 8, device=device), torch.randn(8, device=device)) for rows in (3, 3, 5, 3)]
    outputs = [replayed(*some) for some in inputs]
    for some, output in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(output, call(*some))
    layer.weight.mul_(2)
    torch.testing.assert_close(replayed(*inputs[0]), call(*inputs[0]))


@pytest.mark.gpu
def test_a_model_samples_the_same_by_its_graph() -> None:
    from vdm import TextToVideo

    pipe = TextToVideo.from_pretrained().to("cuda")
    clips = []
    for graph in (False, True):
        generator = torch.Generator().manual_seed(0)
        pipe.config = replace(pipe.config, sampling=replace(pipe.config.sampling, cuda_graph=graph))
        clips.append(pipe("holding a red ball", num_inference_steps=4, generator=generator, output_type="pt").frames)
    torch.testing.assert_close(*clips, atol=1e-3, rtol=0)
