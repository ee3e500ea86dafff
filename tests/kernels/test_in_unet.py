"""A whole UNet on the kernels and on PyTorch's own operations: the same loss, gradients and samples."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from numbers_of_kernels import DEVICE, error
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from vdm.diffusion import DiffusionConfig, NoiseSchedule, ddim_sample
from vdm.errors import UserError
from vdm.models import UNet3D, UNetConfig
from vdm.models.fused import choose

SMALL = dict(
    unet_dim=8, channel_mult=(1,), attention_levels=(True,), num_res_blocks=1, attention_heads=1,
    attention_head_dim=4, temporal_layers=1, context_dim=4, norm_num_groups=2, temporal_dropout=0.0,
)  # fmt: skip
KERNELS = {"temporal_attention", "geglu", "group_norm", "add_layer_norm"}


def unet(kernel: str, **changes: object) -> UNet3D:
    """The same small UNet with either kernel, without layers at zero."""
    model = UNet3D(UNetConfig(**{**SMALL, "attention_kernel": kernel, **changes}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model.to(DEVICE)


def inputs(frames: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents, context = (torch.randn(shape, generator=generator) for shape in ((1, 4, frames, 1, 2), (1, 3, 4)))
    return latents.to(DEVICE), torch.tensor([7], device=DEVICE), context.to(DEVICE)


class Ours(TorchDispatchMode):
    """Within the context, which operators of ours are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace == "vdm":
            self.names.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def calls(model: UNet3D, frames: int) -> tuple[Tensor, list[Tensor], set[str]]:
    """Loss, gradients, and which operators of ours were called on the way there."""
    with Ours() as ours:
        loss = model(*inputs(frames)).square().mean()
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], ours.names


def test_loss_and_gradients() -> None:
    ours, plain = calls(unet("triton"), 5), calls(unet("sdpa"), 5)
    assert ours[2] == KERNELS and not plain[2]
    assert error(ours[0], plain[0]) < 1e-5
    assert len(ours[1]) == len(plain[1]) > 0
    assert max(error(a, b) for a, b in zip(ours[1], plain[1], strict=True)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cheap", "block"])
def test_gradients_under_checkpointing(how: str) -> None:
    from vdm.training.parallel import checkpoint_activations  # importing open_clip takes longer than the other tests

    models = [unet("triton").train() for _ in range(2)]
    checkpoint_activations(models[1], how=how)  # type: ignore[arg-type]
    (_, plain, _), (_, again, names) = (calls(model, 3) for model in models)
    assert names == KERNELS
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.slow
def test_sharded(tmp_path: Path) -> None:
    """By FSDP2, in a group of one: weights are gathered before each block and let go of behind it."""
    from vdm.training.recompute import blocks

    plain, sharded = unet("triton").train(), unet("triton").train()
    expected = calls(plain, 3)[1]
    meeting = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo" if DEVICE == "cpu" else "nccl", store=meeting, rank=0, world_size=1)
    for parameter in sharded.parameters():
        parameter.data = parameter.data.contiguous()  # as FSDP wants it
    try:
        mesh = init_device_mesh(DEVICE, (1,))
        for block in blocks(sharded):
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        _, found, names = calls(sharded, 3)
        assert names == KERNELS
        pairs = zip(found, expected, strict=True)
        assert max(error(a.full_tensor(), b) for a, b in pairs) < 1e-4  # type: ignore[attr-defined]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_samples() -> None:
    found = []
    for kernel in ("triton", "sdpa"):
        model, (noise, _, context) = unet(kernel).eval(), inputs(3)
        with torch.no_grad():
            denoise = lambda x, t, model=model, context=context: model(x, t, context)  # noqa: E731
            found.append(ddim_sample(denoise, noise, NoiseSchedule(DiffusionConfig()).to(DEVICE), num_steps=2))
    assert error(*found) < 1e-5


@pytest.mark.slow
def test_a_model_on_the_kernels_can_be_copied_and_pickled() -> None:
    model = unet("triton")
    with torch.no_grad():
        outputs = [one(*inputs(3)) for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.slow
def test_more_frames_than_the_kernel_takes_are_refused() -> None:
    with pytest.raises(UserError, match="triton, but the kernel takes 1 to 64 frames, got 65; set it to auto or sdpa"):
        unet("triton")(*inputs(65))


@pytest.mark.slow
def test_of_the_kernels_attention_alone_is_not_computed_again_where_recomputing_is_to_be_cheap() -> None:
    from vdm.training.recompute import is_expensive

    choose("triton")  # which registers them
    operators = {name: getattr(torch.ops.vdm, name).default for name in KERNELS}
    assert {name for name, operator in operators.items() if is_expensive(operator)} == {"temporal_attention"}
