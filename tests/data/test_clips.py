from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdm.data.clips import STAMP_TOLERANCE, duration, frame_indices, window_offset
from vdm.errors import UserError

gaps_ms = st.lists(st.integers(0, 400), min_size=0, max_size=60)
rates = st.floats(1.0, 60.0)
lengths = st.integers(1, 40)
fractions = st.floats(0.0, 1.0)


def stamps_from(gaps: list[int], first: float = 0.0) -> np.ndarray:
    return first + np.cumsum([0, *gaps]) / 1000


@given(gaps_ms, st.floats(-5, 5), rates, lengths, fractions)
def test_each_moment_shows_the_last_frame_not_after_it(gaps, first, fps, num_frames, start):
    stamps = stamps_from(gaps, first)
    indices = frame_indices(stamps, fps=fps, num_frames=num_frames, start_fraction=start)
    elapsed = stamps - stamps[0]
    moments = start * max(0.0, elapsed[-1] - (num_frames - 1) / fps) + np.arange(num_frames) / fps
    assert indices.shape == (num_frames,)
    assert indices.min() >= 0 and indices.max() < len(stamps)
    assert (elapsed[indices] <= moments + STAMP_TOLERANCE).all()
    after = np.append(elapsed, np.inf)[indices + 1]
    assert (after > moments + STAMP_TOLERANCE).all()


@given(gaps_ms, rates, lengths, fractions)
def test_time_never_runs_backwards(gaps, fps, num_frames, start):
    indices = frame_indices(stamps_from(gaps), fps=fps, num_frames=num_frames, start_fraction=start)
    assert (np.diff(indices) >= 0).all()


@given(gaps_ms, rates, lengths)
def test_the_ends_of_a_long_enough_clip_are_reached(gaps, fps, num_frames):
    stamps = stamps_from([gap + 1 for gap in gaps])
    first = frame_indices(stamps, fps=fps, num_frames=num_frames, start_fraction=0.0)
    last = frame_indices(stamps, fps=fps, num_frames=num_frames, start_fraction=1.0)
    assert stamps[first[0]] <= STAMP_TOLERANCE  # frames a millisecond apart count as one moment
    assert last[-1] == len(stamps) - 1


@given(st.integers(1, 40), lengths)
def test_a_short_clip_is_played_once_and_its_last_frame_held(count, num_frames):
    indices = frame_indices(np.arange(count) / 8, fps=8, num_frames=num_frames, start_fraction=0.0)
    np.testing.assert_array_equal(indices, np.minimum(np.arange(num_frames), count - 1))


@pytest.mark.parametrize("offset", range(40))
@pytest.mark.parametrize("fps", [8, 12, 24, 25, 29.97, 30])
def test_stamps_rounded_to_milliseconds_still_give_every_frame_once(fps, offset):
    stamps = np.round(1000 * (np.arange(50) / fps + offset / 1700)) / 1000
    indices = frame_indices(stamps, fps=fps, num_frames=50, start_fraction=0.0)
    np.testing.assert_array_equal(indices, np.arange(50))


def test_a_slow_source_repeats_frames_and_a_fast_one_skips_some():
    slow = frame_indices(np.arange(5) / 4, fps=8, num_frames=8, start_fraction=0.0)
    fast = frame_indices(np.arange(32) / 32, fps=8, num_frames=8, start_fraction=0.0)
    assert slow.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert fast.tolist() == [0, 4, 8, 12, 16, 20, 24, 28]


def test_variable_frame_rate_is_sampled_by_time_not_by_count():
    stamps = [0.0, 0.05, 0.1, 0.15, 1.0, 2.0]
    assert frame_indices(stamps, fps=2, num_frames=5, start_fraction=0.0).tolist() == [0, 3, 4, 4, 5]


@pytest.mark.parametrize("wrong", [{"fps": 0.0}, {"fps": -1.0}, {"num_frames": 0}, {"start_fraction": 1.5}])
def test_impossible_requests_are_refused(wrong):
    with pytest.raises(UserError):
        frame_indices([0.0, 1.0], **{"fps": 8.0, "num_frames": 4, "start_fraction": 0.0, **wrong})


@given(st.integers(1, 30), st.sampled_from([4.0, 8.0, 12.0]), lengths)
def test_a_loop_goes_round_and_round(count, rate, num_frames):
    stamps = np.arange(count) / rate
    indices = frame_indices(stamps, fps=rate, num_frames=num_frames, start_fraction=0.0, loop=True)
    if count > 1:
        assert duration(stamps) == pytest.approx(count / rate)
        np.testing.assert_array_equal(indices, np.arange(num_frames) % count)
    else:
        assert (indices == 0).all()


def test_the_last_frame_is_shown_as_long_as_the_others():
    assert duration([0.0, 0.1, 0.2, 0.3]) == pytest.approx(0.4)
    assert duration([5.0, 5.1, 5.2, 6.2]) == pytest.approx(1.3)
    assert duration([3.0]) == 1.0


@given(gaps_ms, rates, lengths, lengths, fractions, st.booleans())
def test_a_shorter_window_is_a_part_of_the_longest(gaps, fps, one, other, start, loop):
    """So a cache of longest windows gives every window that the files give, bit for bit."""
    stamps, (short, longest) = stamps_from(gaps), sorted((one, other))
    whole = frame_indices(stamps, fps=fps, num_frames=longest, start_fraction=start, loop=loop)
    part = frame_indices(stamps, fps=fps, num_frames=short, start_fraction=start, loop=loop, longest=longest)
    first = window_offset(stamps[-1] - stamps[0], fps=fps, num_frames=short, longest=longest, start_fraction=start)
    assert 0 <= first <= longest - short
    np.testing.assert_array_equal(part, whole[first : first + short])


@given(gaps_ms, rates, lengths, lengths, fractions)
def test_and_lies_less_than_a_frame_before_its_exact_place(gaps, fps, one, other, start):
    stamps, (short, longest) = stamps_from(gaps), sorted((one, other))
    elapsed = stamps[-1] - stamps[0]
    first = window_offset(elapsed, fps=fps, num_frames=short, longest=longest, start_fraction=start)
    begin, exact = (start * max(0.0, elapsed - (frames - 1) / fps) for frames in (longest, short))
    assert -1e-6 <= exact - (begin + first / fps) <= 1 / fps
    if start == 0:
        assert first == 0


def test_windows_that_end_with_the_clip_do_so_at_every_length():
    stamps = np.arange(48) / 12
    for length in range(1, 25):
        indices = frame_indices(stamps, fps=8, num_frames=length, start_fraction=1.0, longest=24)
        assert indices[-1] == 47
