"""Candidate sets that depend on nothing but seed and id, ranks with ties by hand, and what CLIP cannot see."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdm.errors import UserError
from vdm.metrics.retrieval import (
    Caption,
    expected_credit,
    expected_rank,
    fill_template,
    normalised,
    num_slots,
    retrieval,
    rp100,
    rp_action,
    rp_object,
    rp_pair,
    similarities,
)
from vdm.metrics.template_pairs import MIRRORED, PAIRS, PRETENDED, REVERSED
from vdm.templates import SSV2_TEMPLATES
from vdm.vocabulary import ACTIONS

THINGS = ("a red cup", "a book", "the lid", "A Pen", "a green ball")


def caption(index: int, template: str) -> Caption:
    objects = tuple(THINGS[(index + slot) % len(THINGS)] for slot in range(num_slots(template)))
    return Caption(str(index), fill_template(template, objects), template, objects)


POOL = [caption(index, SSV2_TEMPLATES[index * 7 % 174]) for index in range(240)]
PUSH = Caption("p", "pushing a red cup from left to right", "Pushing [something] from left to right", ("a red cup",))


# Captions


def test_filling() -> None:
    assert fill_template("[Something] colliding with [something]", ["Cup", "a pen"]) == "cup colliding with a pen"
    with pytest.raises(ValueError, match="2 slots, not 1"):
        Caption("x", "", "Putting [something] into [something]", ("a cup",))


def test_what_counts_as_the_same_prompt() -> None:
    assert normalised(" Pushing  [something] Up.") == normalised("pushing something up")


# Candidate sets


def test_rp100_is_ninety_nine_other_prompts_of_other_templates() -> None:
    by_text: dict[str, set[str]] = {}
    for one in POOL:
        by_text.setdefault(normalised(one.text), set()).add(one.template)
    for one in POOL[:40]:
        drawn = rp100(one, POOL, seed=0)
        assert drawn[0] == one.text and len(drawn) == len({normalised(text) for text in drawn}) == 100
        assert not any(one.template in by_text[normalised(text)] for text in drawn[1:])


def test_the_same_template_and_the_same_string_are_left_out() -> None:
    twin = Caption("t", "Pushing a red CUP from left to right. ", "Pushing [something] so it spins", ("a red cup",))
    bare = Caption("b", "another", "Pushing something from left to right", ())
    also = Caption("a", "another", "Holding [something]", ("a pen",))  # said of a clip with the template as well
    good = Caption("g", "holding a pen", "Holding [something]", ("a pen",))
    assert rp100(PUSH, [twin, bare, also, good, PUSH], seed=0, num=1) == [PUSH.text, "holding a pen"]
    with pytest.raises(UserError, match="needs 2 prompts of other templates, and there are 1"):
        rp100(PUSH, [twin, bare, also, good, PUSH], seed=0, num=2)


@settings(max_examples=25)
@given(order=st.permutations(range(60)), seed=st.integers(0, 9), world=st.integers(1, 4))
def test_sets_depend_neither_on_order_nor_on_rank(order: list[int], seed: int, world: int) -> None:
    pool, shuffled = POOL[:60], [POOL[index] for index in order]
    alone = {one.id: (rp100(one, pool, seed=seed, num=9), rp_object(one, pool, seed=seed, num=3)) for one in pool[:8]}
    for rank in range(world):
        for one in pool[:8][rank::world]:
            found = rp100(one, shuffled, seed=seed, num=9), rp_object(one, shuffled, seed=seed, num=3)
            assert found == alone[one.id]


def test_seed_and_id_choose_the_set() -> None:
    sets = {tuple(rp100(Caption(i, *_rest(PUSH)), POOL, seed=seed)[1:]) for i in "ab" for seed in (0, 1)}
    assert len(sets) == 4
    again = rp100(PUSH, POOL, seed=0, num=3)
    assert again == rp100(PUSH, POOL, seed=0, num=3)
    assert again[1:] == [
        "pretending or failing to wipe a pen off of a green ball",
        "pulling a book from left to right",
        "tearing a book just a little bit",
    ], "on every machine and in every version"


def _rest(one: Caption) -> tuple[str, str, tuple[str, ...]]:
    return one.text, one.template, one.objects


def test_of_two_spellings_the_same_one_is_taken_in_any_order() -> None:
    pool = [Caption(text, text, "Holding [something]", ("a pen",)) for text in ("holding a pen", "Holding a  pen.")]
    assert rp100(PUSH, pool, seed=0, num=1) == rp100(PUSH, pool[::-1], seed=0, num=1)


def test_every_prompt_is_drawn_about_as_often() -> None:
    pool = [Caption(str(i), f"prompt {i}", "other") for i in range(20)]
    counts = dict.fromkeys((one.text for one in pool), 0)
    for clip in range(1000):
        for text in rp100(Caption(f"c{clip}", "true", "own"), pool, seed=0, num=5)[1:]:
            counts[text] += 1
    assert max(abs(count - 250) for count in counts.values()) < 60, "binomial: 250 +- 14"


def test_rp_action_is_every_other_template_of_as_many_slots() -> None:
    found = rp_action(PUSH)
    # A hole is poked "into [some substance]" and "into [something soft]": one text, one candidate.
    single = [template for template in SSV2_TEMPLATES if num_slots(template) == 1]
    assert found[0] == PUSH.text and sorted(found) == sorted({fill_template(t, ["a red cup"]) for t in single})
    ours = rp_action(PUSH, templates=[action.template for action in ACTIONS])
    assert len(ours) == sum(action.num_slots == 1 for action in ACTIONS) and ours[0] == PUSH.text
    assert set(rp_action(PUSH, templates=reversed(SSV2_TEMPLATES))) == set(found)


def test_rp_object_keeps_the_template_and_changes_the_objects() -> None:
    found = rp_object(PUSH, POOL, seed=0)
    assert found[0] == PUSH.text
    assert set(found[1:]) == {f"pushing {thing.lower()} from left to right" for thing in THINGS} - {PUSH.text}
    assert len(rp_object(PUSH, POOL, seed=0, num=2)) == 3
    assert rp_object(PUSH, [PUSH], seed=0) == [PUSH.text], "nothing to tell it from"


def test_rp_pair_is_the_mirror_the_reverse_and_the_pretence() -> None:
    assert rp_pair(PUSH) == [
        [PUSH.text, "pulling a red cup from right to left"],
        [PUSH.text, "pushing a red cup from right to left"],
    ]
    pick = Caption("k", "", "Picking [something] up", ("a pen",))
    assert [other for _, other in rp_pair(pick)] == ["pretending to pick a pen up", "putting a pen on a surface"]
    assert rp_pair(Caption("h", "", "Holding [something]", ("a pen",))) == []


def test_pairs_are_templates_of_the_data_set_with_the_same_slots() -> None:
    assert len(PAIRS) == len(MIRRORED) + len(REVERSED) + len(PRETENDED)
    for one, other in PAIRS:
        assert {one, other} <= set(SSV2_TEMPLATES) and num_slots(one) == num_slots(other) and one != other
    assert len({frozenset(pair) for pair in PAIRS}) == len(PAIRS)


# Ranks


def test_all_scores_equal_is_chance() -> None:
    level = torch.zeros(100)
    assert expected_credit(level, at=1) == pytest.approx(0.01)
    assert expected_rank(level) == pytest.approx(50.5)
    found = retrieval([level] * 7)
    assert found.recall == pytest.approx(found.chance) and found.recall == pytest.approx({1: 0.01, 5: 0.05, 10: 0.1})


def test_ties_by_hand() -> None:
    rows = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.3, 0.1], [0.2, 0.5, 0.5]])
    found = retrieval(list(rows), at=(1, 2))
    assert found.recall == pytest.approx({1: 0.5, 2: 2 / 3})
    assert found.chance == pytest.approx({1: 1 / 3, 2: 2 / 3})
    assert found.median_rank == 1.5 and found.num_clips == 3
    assert retrieval(list(rows[[0, 2]])).median_rank == 2.0, "the middle of two"


scores = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(row=scores, at=st.integers(1, 7))
def test_credit_and_rank_are_means_over_all_ways_to_break_the_ties(row: list[int], at: int) -> None:
    """The oracle: sort by score, equal ones in each order in turn, and look where the truth comes."""
    places = [
        sorted(range(len(row)), key=lambda i: (-row[i], order[i])).index(0)
        for order in itertools.permutations(range(len(row)))
    ]
    tensor = torch.tensor(row, dtype=torch.float64)
    assert expected_credit(tensor, at=at) == pytest.approx(sum(place < at for place in places) / len(places))
    assert expected_rank(tensor) == pytest.approx(1 + sum(places) / len(places))


def test_scores_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="no clips"):
        retrieval([])
    for bad in (torch.tensor([0.1, torch.nan]), torch.zeros(2, 2), torch.zeros(0)):
        with pytest.raises(ValueError, match="finite"):
            retrieval([bad])


def letters(texts: Sequence[str]) -> Tensor:
    """A text tower that counts letters: enough to tell texts apart."""
    counts = torch.tensor([[text.lower().count(letter) for letter in "abcdeghilnoprstu"] for text in texts])
    return torch.nn.functional.normalize(counts.float(), dim=-1)


def test_similarities_are_the_mean_cosines_and_equal_texts_tie() -> None:
    candidates = [["a dog", "a cup", "God, a"], ["a cup", "a dog"]]
    frames = torch.nn.functional.normalize(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    found = similarities(frames, candidates, texts=letters)
    for clip, row, got in zip(frames, candidates, found, strict=True):
        wanted = (clip.double() @ letters(row).double().T).mean(0)
        torch.testing.assert_close(got, wanted)
    assert found[0][0] == found[0][2], "an anagram"
    with pytest.raises(ValueError, match="do not fit"):
        similarities(frames, candidates[:1], texts=letters)


def test_a_mean_over_frames_is_blind_to_their_order() -> None:
    frames = torch.nn.functional.normalize(torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    pair = rp_pair(PUSH)[0]
    forwards, backwards = (similarities(f, [pair], texts=letters)[0] for f in (frames, frames.flip(1)))
    torch.testing.assert_close(forwards, backwards)
