"""The shipped classifier knows the actions, from motion and not from looks, and whatever the batch."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vdm.data.casting import compose
from vdm.data.mini_something import render_clip
from vdm.errors import UserError
from vdm.metrics.toy import FEATURES, SHIPPED, ToyClassifier, load_toy_classifier
from vdm.vocabulary import ACTIONS, MIRRORED, REWOUND
from vdm.weights import open_weights

SEED = 3  # of clips that it was not trained on
NAMES = [action.name for action in ACTIONS]
# The classifier has never seen a clip backwards: only actions whose reverse leaves nothing to argue about.
ARGUED = ("pick_up", "put_on_surface", "move_down", "throw_and_catch", "hold")
REWOUND_CLEARLY = {name: other for name, other in REWOUND.items() if name not in ARGUED}


@pytest.fixture(scope="module")
def net() -> ToyClassifier:
    return load_toy_classifier()


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """(64,16,64,64,3): four clips of each action, in the order of NAMES."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    for index in itertools.count():
        frames = found[compose(index, seed=SEED).action.name]
        if len(frames) < 4:
            frames.append(render_clip(index, seed=SEED, height=64, width=64, num_frames=16, fps=8.0).frames)
        if all(len(frames) == 4 for frames in found.values()):
            break
    return torch.from_numpy(np.stack([frames for name in NAMES for frames in found[name]]))


def right(net: ToyClassifier, clips: Tensor, *, becomes: dict[str, str], keep: bool = False) -> float:
    """The share of clips that are taken for what their action becomes, among those that change, or (`keep`) all."""
    rows = [(i, becomes.get(name, name)) for i, name in enumerate(np.repeat(NAMES, 4)) if keep or name in becomes]
    taken = net(clips[[i for i, _ in rows]]).logits.argmax(1).tolist()
    return float(np.mean([NAMES[one] == name for one, (_, name) in zip(taken, rows, strict=True)]))


def test_it_knows_the_actions(net: ToyClassifier, clips: Tensor) -> None:
    assert right(net, clips, becomes={}, keep=True) >= 0.9


def test_it_sees_motion(net: ToyClassifier, clips: Tensor) -> None:
    """A mirror turns directions around and leaves the rest; time turns what has an opposite; a still has no action."""
    assert right(net, clips.flip(3), becomes=MIRRORED, keep=True) >= 0.9
    assert right(net, clips.flip(1), becomes=REWOUND_CLEARLY) >= 0.8
    rng = np.random.default_rng(0)  # an order for each clip: one for all may leave the early frames before the late
    shuffled = torch.stack([clip[torch.from_numpy(rng.permutation(16))] for clip in clips])
    assert right(net, shuffled, becomes={}, keep=True) < 0.7
    still = clips[:, :1].expand(-1, 16, -1, -1, -1)
    assert right(net, still, becomes={}, keep=True) < 0.4


def test_neither_batch_nor_call_matters(net: ToyClassifier, clips: Tensor) -> None:
    some = clips[:56:8].clone()
    before, together = some.clone(), net(some)
    assert together.logits.shape == (7, 16) and together.features.shape == (7, FEATURES)
    assert together.logits.dtype == together.features.dtype == torch.float32
    for i in range(7):
        for alone, among in zip(net(some[i : i + 1]), together, strict=True):
            torch.testing.assert_close(alone[0], among[i], rtol=1e-5, atol=1e-5)
    assert torch.equal(net(some).features, together.features) and torch.equal(some, before)
    # What the features hold is all that the classes are made of.
    torch.testing.assert_close(net.head(together.features), together.logits)
    assert not together.logits.requires_grad


def test_any_number_of_frames_and_no_other_clip(net: ToyClassifier, clips: Tensor) -> None:
    for frames in (1, 5, 24):
        assert net(clips[:1, [t % 16 for t in range(frames)]]).features.shape == (1, FEATURES)
    for wrong in (clips[:1].float(), clips[0], clips[:1, :, :32], clips[:1, :0], clips[:1].permute(0, 1, 4, 2, 3)):
        with pytest.raises(ValueError, match="uint8"):
            net(wrong)


def test_the_file_is_small_and_the_one_that_is_meant(tmp_path: Path) -> None:
    assert SHIPPED.stat().st_size <= 2_000_000
    weights = open_weights(SHIPPED)
    assert {weights.specs[name].dtype for name in weights} == {torch.float16, torch.int64}
    with pytest.raises(UserError, match=r"nowhere\.safetensors is missing"):
        load_toy_classifier(tmp_path / "nowhere.safetensors")
    other = bytearray(SHIPPED.read_bytes())
    other[-1] ^= 1
    (tmp_path / "other.safetensors").write_bytes(other)
    with pytest.raises(UserError, match="restore the file"):
        load_toy_classifier(tmp_path / "other.safetensors")
