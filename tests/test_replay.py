"""Replaying gives what calling does; training by it is refused without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from vdm.config import Config
from vdm.errors import UserError
from vdm.models import UNet3D, UNetConfig
from vdm.replay import Replayed, replay_in_training
from vdm.training.parallel import parallelize, require_possible
from vdm.training.settings import TrainingConfig


def test_training_by_a_graph_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = Config("x", model=UNetConfig(temporal_dropout=0.0), training=TrainingConfig(cuda_graph=True))
    require_possible(fits.training, there=1, num_clips=8)
    with pytest.raises(UserError, match="training.cuda_graph is for one process, and here are 2"):
        require_possible(fits.training, there=2, num_clips=8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="training.cuda_graph needs a GPU, and there is none; set it to false"):
        replay_in_training(nn.Linear(1, 1))
    with pytest.raises(UserError, match="cuda_graph would drop the same numbers .* model.temporal_dropout=0, not 0.1"):
        replace(fits, model=UNetConfig(temporal_dropout=0.1))
    with pytest.raises(UserError, match="cuda_graph would drop the same numbers .* model.dropout=0, not 0.2"):
        replace(fits, model=UNetConfig(temporal_dropout=0.0, dropout=0.2))
    for name, value, wanted in (
        ("task", "vae", "unet"),
        ("gradient_accumulation_steps", 2, "1"),
        ("gradient_checkpointing", "cheap", "none"),
        ("compile", True, "false"),
        ("lora_rank", 4, "null"),
    ):
        with pytest.raises(UserError, match=f"cuda_graph needs training.{name}={wanted}, not {value}; set it so"):
            TrainingConfig(cuda_graph=True, init_from="x", **{name: value})  # type: ignore[arg-type]


def test_only_a_unet_in_training_is_replayed_and_only_for_its_first_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded is PyTorch's affair; here it is only counted when the result would be replayed."""
    replays: list[torch.Size] = []

    def record(module: nn.Module, likes: tuple[Tensor, ...], allow_unused_input: bool) -> None:
        assert not torch.is_autocast_cache_enabled() and all(like.is_leaf for like in likes)
        plain = module.forward

        def replay(*tensors: Tensor) -> Tensor:
            replays.append(tensors[0].shape)
            return plain(*tensors)

        module.forward = replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parts = {"unet": nn.Linear(3, 2), "text": nn.Linear(3, 2)}
    settings = TrainingConfig(cuda_graph=True)
    parallelize(parts, lambda batch: {}, settings, passed=parts)
    outputs = [parts["unet"](torch.ones(rows, 3)) for rows in (4, 4, 1, 4)]
    assert replays == [torch.Size([4, 3])] * 3, "the shapes of the first call, that one too"
    assert torch.equal(outputs[2], outputs[0][:1])
    parts["text"](torch.ones(4, 3))
    parts["unet"].eval()(torch.ones(4, 3))
    with torch.no_grad():
        parts["unet"].train()(torch.ones(4, 3))
    assert len(replays) == 3


def test_a_recording_that_fails_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("too little")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module = nn.Linear(3, 2)
    replay_in_training(module)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            module(torch.ones(4, 3))


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


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_by_a_graph_are_those_of_the_calls(autocast: bool) -> None:
    """In training, of weights that move in between; other shapes and evaluation go by the plain call."""
    torch.manual_seed(0)
    config = UNetConfig(
        unet_dim=32, channel_mult=(1, 2), attention_levels=(False, True), attention_head_dim=16, context_dim=16
    )
    plain = UNet3D(config).cuda().train()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.05 * torch.randn_like(p))
    graphed = copy.deepcopy(plain)
    replay_in_training(graphed)

    def gradients(unet: UNet3D, clips: int, seed: int) -> list[Tensor]:
        draw = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(clips, 4, 3, 8, 8, device="cuda", generator=draw)
        context = torch.randn(clips, 5, 16, device="cuda", generator=draw).requires_grad_()
        t = torch.randint(1000, (clips,), device="cuda", generator=draw)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = unet(x, t, context).float().square().mean()
        unet.zero_grad(set_to_none=True)
        loss.backward()
        assert context.grad is not None
        return [loss.detach().clone(), context.grad, *(p.grad.clone() for p in unet.parameters() if p.grad is not None)]

    for seed, clips in enumerate((2, 2, 1, 2)):
        found, expected = gradients(graphed, clips, seed), gradients(plain, clips, seed)
        least = 1e-3 * max(float(one.norm()) for one in expected)  # beside which a gradient is rounding alone
        pairs = zip(found, expected, strict=True)
        worst = max(float((a - b).norm() / b.norm().clamp(min=least)) for a, b in pairs)
        assert worst < (0.05 if autocast else 0.01), (seed, worst)
        with torch.no_grad():
            for unet in (graphed, plain):
                for p in unet.parameters():
                    p.mul_(0.95)
    x, t, context = torch.randn(2, 4, 3, 8, 8).cuda(), torch.zeros(2).cuda(), torch.randn(2, 5, 16).cuda()
    with torch.no_grad():
        torch.testing.assert_close(graphed.eval()(x, t, context), plain.eval()(x, t, context), atol=1e-3, rtol=1e-3)
