"""However clips are shared out among processes, they come together as one set."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as process_group
from hypothesis import given
from hypothesis import strategies as st

from vdm.metrics.frechet import frechet_distance
from vdm.metrics.gathering import gather_by_id, merge_by_id

ROOT = Path(__file__).resolve().parents[2]
IDS = ["b", "10", "a", "9", "c"]
FEATURES = torch.arange(10.0).reshape(5, 2)
SORTED = (["10", "9", "a", "b", "c"], FEATURES[[1, 3, 2, 0, 4]])


@given(st.lists(st.integers(0, 3), min_size=5, max_size=5), st.permutations(range(5)), st.integers(0, 4))
def test_shares_do_not_matter(owners: list[int], order: list[int], twice: int) -> None:
    shares = []
    for rank in range(4):
        mine = [number for number in order if owners[number] == rank]
        if rank == 3:
            mine.append(twice)  # as a sampler that pads its shares would
        shares.append(([IDS[number] for number in mine], FEATURES[mine]))
    ids, features = merge_by_id(shares)
    assert ids == SORTED[0] and torch.equal(features, SORTED[1])


def test_any_feature_will_do() -> None:
    frames = torch.rand(2, 3, 4)
    assert torch.equal(merge_by_id([(["b", "a"], frames)])[1], frames.flip(0))
    broken = torch.tensor([[math.nan]])
    assert merge_by_id([(["a"], broken)])[1].isnan().all(), "whether numbers are any is for the metric to say"
    nothing = torch.zeros(0, 7)
    ids, features = merge_by_id([([], nothing), ([], nothing)])
    assert ids == [] and features.shape == (0, 7)
    # A process without clips does not know of what shape their features would have been.
    assert torch.equal(merge_by_id([([], torch.zeros(0)), (IDS, FEATURES)])[1], SORTED[1])


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ((["a"], torch.ones(1, 2)), "clip a has two different features"),
        ((["x", "y"], torch.ones(1, 2)), "2 ids for 1 features"),
        ((["x"], torch.ones(1, 3)), "differ in shape or dtype"),
        ((["x"], torch.ones(1, 2).double()), "differ in shape or dtype"),
    ],
)
def test_what_does_not_match_is_refused(second: tuple[list[str], torch.Tensor], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        merge_by_id([(IDS, FEATURES), second])


def test_one_process() -> None:
    kept = FEATURES.clone()
    for _ in range(2):
        ids, features = gather_by_id(IDS, FEATURES)
        assert ids == SORTED[0] and torch.equal(features, SORTED[1])
    assert torch.equal(FEATURES, kept)


def test_one_process_in_a_group() -> None:
    process_group.init_process_group("gloo", store=process_group.HashStore(), rank=0, world_size=1)
    try:
        ids, features = gather_by_id(IDS, FEATURES.clone().requires_grad_())
        assert ids == SORTED[0] and torch.equal(features, SORTED[1]) and not features.requires_grad
    finally:
        process_group.destroy_process_group()


SCRIPT = """
import sys
import torch
import torch.distributed as process_group
from vdm.metrics.frechet import frechet_distance
from vdm.metrics.frechet import frechet_distance
from vdm.metrics.gathering import gather_by_id

rank, store = int(sys.argv[1]), sys.argv[2]
process_group.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
ids = [f"{number:03d}" for number in range(25)]
features = torch.randn(25, 6, generator=torch.Generator().manual_seed(0))
together, whole = gather_by_id(ids[rank::2], features[rank::2])
assert together == ids and torch.equal(whole, features)
only_there, _ = gather_by_id(ids if rank == 1 else [], features if rank == 1 else torch.zeros(0))
assert only_there == ids
try:
    gather_by_id([f"odd {rank}"], features[: 1 + rank])  # wrong in one of them, and said by both
except ValueError as error:
    assert "1 ids for 2 features" in str(error)
else:
    raise AssertionError("it was let pass")
print(frechet_distance(whole, torch.ones(3, 6)).hex())
process_group.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "store")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    shown = [process.communicate(timeout=120) for process in started]
    assert all(process.returncode == 0 for process in started), shown
    features = torch.randn(25, 6, generator=torch.Generator().manual_seed(0))
    alone = frechet_distance(gather_by_id([f"{number:03d}" for number in range(25)], features)[1], torch.ones(3, 6))
    assert [float.fromhex(out) for out, _ in shown] == [alone, alone], "to the last digit"
