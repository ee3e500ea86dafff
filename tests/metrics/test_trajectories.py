"""Paths of things against what the renderer knows, and numbers of motions made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vdm.data.dataset import VALIDATION_OFFSET
from vdm.data.mini_something import render_clip
from vdm.metrics.segmentation import HAND, NAMES, WHITE, segment
from vdm.metrics.trajectories import Motion, find_hands, follow, grasp, measure

RED, GREEN = 1 + NAMES.index("red"), 1 + NAMES.index("green")


def labelled(*frames: dict[int, tuple[int, int, int, int]]) -> np.ndarray:
    """Labels (T,50,50) from rectangles (left, top, right, bottom) of each label in each frame."""
    labels = np.zeros((len(frames), 50, 50), np.uint8)
    for frame, rectangles in zip(labels, frames, strict=True):
        for label, (left, top, right, bottom) in rectangles.items():
            frame[top:bottom, left:right] = label
    return labels


def motion_of(labels: np.ndarray) -> Motion:
    track = follow(labels, GREEN)
    return measure(track, grasp(track, find_hands(labels)), labels)


def test_paths_of_rendered_things() -> None:
    for index in range(VALIDATION_OFFSET, VALIDATION_OFFSET + 12):
        clip = render_clip(index, seed=0, height=64, width=64, num_frames=8, fps=4.0)
        labels = segment(clip.frames).labels
        for colour, truth in zip(clip.colours, clip.truth.objects, strict=True):
            track = follow(labels, 1 + NAMES.index(colour))
            both = track.seen & truth.visible
            assert both.sum() >= 0.8 * truth.visible.sum()
            moved = track.at[both] - track.at[both][0], truth.centre[both] - truth.centre[both][0]
            assert np.abs(moved[0] - moved[1]).max() < 0.08, clip.label


def test_the_largest_patch_with_its_pieces() -> None:
    labels = labelled({GREEN: (10, 10, 20, 20)})
    labels[0, 10:20, 12:16] = HAND  # fingers part it
    labels[0, 40:43, 40:43] = GREEN  # a speck elsewhere
    track = follow(labels, GREEN)
    assert track.area[0] == pytest.approx(60 / 2500)
    assert track.at[0].tolist() == pytest.approx([(2 * 11 + 4 * 18) / 6 / 50, 0.3])
    assert follow(labels, RED).seen.tolist() == [False]
    assert np.isnan(follow(labels, RED).at).all()


def test_gaps_and_sides() -> None:
    labels = labelled({GREEN: (20, 20, 30, 30), HAND: (35, 22, 47, 28)}, {GREEN: (20, 20, 30, 30)})
    near = grasp(follow(labels, GREEN), find_hands(labels))
    assert near.gap[0] == pytest.approx(5 / 50, abs=0.01)
    assert near.beside[0].tolist() == pytest.approx([0.32, 0.0])
    assert np.isnan(near.gap[1]) and np.isnan(near.beside[1]).all()


def test_the_rim_of_a_red_thing_is_no_hand() -> None:
    labels = labelled({HAND: (10, 10, 22, 22)})
    labels[0, 13:19, 13:19] = RED
    assert not find_hands(labels).any()
    assert find_hands(labelled({HAND: (10, 10, 22, 22)})).max() == 1


def test_motions_by_hand() -> None:
    right = [{GREEN: (5 + 2 * t, 20, 15 + 2 * t, 30), HAND: (0, 22, 4 + 2 * t, 28)} for t in range(1, 16)]
    m = motion_of(labelled(*right))
    assert (m.right, m.up, m.growth) == pytest.approx((0.56, 0, 0), abs=1e-9)
    assert (m.contact, m.detours[0]) == pytest.approx((1, 0), abs=1e-9)
    assert m.hand_ahead < 0 and not m.gone
    larger = [{GREEN: (25 - t, 25 - t, 25 + t, 25 + t)} for t in (5, 5, 8, 10, 10)]
    m = motion_of(labelled(*larger))
    assert m.growth == pytest.approx(np.log(2))
    assert np.isnan(m.last_gap) and m.contact == 0
    up = [{GREEN: (20, 30 - y, 30, 40 - y)} for y in (0, 0, 10, 20, 20, 10, 0, 0)]
    m = motion_of(labelled(*up))
    assert (m.rise, m.up, m.way_up_and_down) == pytest.approx((0.4, 0, 0.8))


def test_gone_under_white() -> None:
    covered = [{GREEN: (20, 20, 30, 30)}] * 4 + [{WHITE: (15, 15, 35, 35)}] * 4
    m = motion_of(labelled(*covered))
    assert m.gone and m.whitened == 1
    flickering = [{GREEN: (20, 20, 30, 30)}, {}] * 4
    assert not motion_of(labelled(*flickering)).gone
