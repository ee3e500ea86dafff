"""TextEncoder: what the context depends on, which tokens training saw, and the packed vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdm.errors import UserError
from vdm.text.encoder import TOKEN_TABLE, VOCABULARY, TextConfig, TextEncoder, pack_vocabulary, unpack_vocabulary

TINY = TextConfig(text_width=8, text_heads=2, text_layers=3, context_length=12)
START, END, PADDING = 49_406, 49_407, 0


@pytest.fixture
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(TINY).eval()


def encode(encoder: TextEncoder, *prompts: str) -> Tensor:
    with torch.inference_mode():
        return encoder(prompts)


# The context


@settings(max_examples=5)
@given(
    st.lists(st.text(max_size=40), min_size=1, max_size=3),
    st.sampled_from([1, 4]),
    st.integers(2, 3),
    st.integers(3, 9),
)
def test_context_has_a_row_for_every_place_padded_or_not(
    prompts: list[str], heads: int, layers: int, length: int
) -> None:
    encoder = TextEncoder(TextConfig(text_width=4, text_heads=heads, text_layers=layers, context_length=length))
    context = encode(encoder, *prompts)
    assert context.shape == (len(prompts), length, 4)
    assert context.isfinite().all()


def test_the_last_layer_is_never_built(encoder: TextEncoder) -> None:
    assert len(encoder.tower.transformer.resblocks) == TINY.text_layers - 1
    assert encoder.tower.text_projection is None


def test_word_order_and_words_change_the_context(encoder: TextEncoder) -> None:
    a, b, c = encode(encoder, "push left to right", "push right to left", "push right to right")
    assert (a - b).abs().max() > 0.1 and (a - c).abs().max() > 0.1 and (b - c).abs().max() > 0.1


def test_at_the_start_places_weigh_as_much_as_words(encoder: TextEncoder) -> None:
    words, places = encoder.tower.token_embedding.weight.std().item(), encoder.tower.positional_embedding.std().item()
    assert places == pytest.approx(words, rel=0.25)


def test_a_token_looks_back_only(encoder: TextEncoder) -> None:
    a, b = encode(encoder, "push the red cup", "push the red ball")
    same = [torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b, strict=True)]
    assert same == [True] * 4 + [False] * (TINY.context_length - 4)  # start, push, the, red | cup, end, padding


def test_a_prompt_does_not_depend_on_its_neighbours(encoder: TextEncoder) -> None:
    both = encode(encoder, "push the red cup", "lift a ball up")
    torch.testing.assert_close(both[1:], encode(encoder, "lift a ball up"))


def test_a_long_prompt_is_cut(encoder: TextEncoder) -> None:
    long, cut = "a red cup " * 20, "a red cup " * 3 + "a"  # 10 words between start and end
    assert torch.equal(encode(encoder, long), encode(encoder, cut))


def test_padding_counts_from_the_end_of_the_prompt(encoder: TextEncoder) -> None:
    """The padding attends to the prompt too: it differs between prompts, as in the original."""
    a, b = encode(encoder, "push", "lift")
    assert (a[3:] - b[3:]).abs().amax(1).min() > 1e-4


def test_gradients_reach_every_parameter(encoder: TextEncoder) -> None:
    (encoder(["push the red cup"]) * torch.randn(TINY.context_length, TINY.text_width)).sum().backward()
    silent = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not silent
    grad = encoder.tower.token_embedding.weight.grad
    assert grad is not None and grad.any(1).sum() == 7  # four words, start, end, padding


# Which tokens training saw


def test_tokens_are_seen_in_training_only(encoder: TextEncoder) -> None:
    encode(encoder, "push the cup")
    assert not encoder.seen_tokens.any()
    encoder.train()
    encode(encoder, "push the cup", "push the ball")
    words = encoder.tokenizer.encode("push the cup ball")
    assert sorted([START, END, PADDING, *words]) == encoder.seen_tokens.nonzero().flatten().tolist()
    encode(encoder, "lift")
    assert encoder.seen_tokens.sum() == len(words) + 4, "earlier prompts stay seen"


def test_seen_tokens_are_saved(encoder: TextEncoder) -> None:
    assert encoder.state_dict()["seen_tokens"].dtype == torch.bool


# The packed vocabulary


@settings(max_examples=10)
@given(st.sets(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20))
def test_packing_keeps_seen_rows_and_gives_the_others_their_mean(ids: set[int]) -> None:
    table = torch.randn(VOCABULARY, 3, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(VOCABULARY, dtype=torch.bool)
    seen[list(ids)] = True
    state = {TOKEN_TABLE: table, "seen_tokens": seen, "other": torch.ones(2)}
    packed = pack_vocabulary(state)
    assert sorted(packed) == ["other", "token_ids", "token_rows"]
    assert packed["token_rows"].shape == (len(ids) + 1, 3)
    unpacked = unpack_vocabulary(packed)
    assert sorted(unpacked) == sorted(state)
    assert torch.equal(unpacked["seen_tokens"], seen)
    assert torch.equal(unpacked[TOKEN_TABLE][seen], table[seen])
    torch.testing.assert_close(unpacked[TOKEN_TABLE][~seen], table[seen].mean(0).expand(VOCABULARY - len(ids), 3))


def test_packing_and_unpacking_leave_their_argument_alone(encoder: TextEncoder) -> None:
    encode(encoder.train(), "push")
    state = encoder.state_dict()
    names = set(state)
    packed = pack_vocabulary(state)
    assert set(state) == names
    names = set(packed)
    unpack_vocabulary(packed)
    assert set(packed) == names


def test_a_packed_tower_says_the_same_of_what_it_saw(encoder: TextEncoder) -> None:
    encode(encoder.train(), "push the red cup", "lift the ball")
    other = TextEncoder(TINY).eval()
    other.load_state_dict(unpack_vocabulary(pack_vocabulary(encoder.eval().state_dict())))
    assert torch.equal(encode(other, "lift the red ball"), encode(encoder, "lift the red ball"))
    assert not torch.equal(encode(other, "zebra"), encode(encoder, "zebra"))
    assert torch.equal(encode(other, "zebra"), encode(other, "giraffe")), "unseen words share one row"


def test_the_mean_of_half_precision_rows_is_taken_in_full() -> None:
    rows = torch.full((VOCABULARY, 2), 60_000.0, dtype=torch.float16)
    packed = pack_vocabulary({TOKEN_TABLE: rows, "seen_tokens": torch.ones(VOCABULARY, dtype=torch.bool)})
    assert packed["token_rows"].dtype == torch.float16
    assert torch.equal(packed["token_rows"][-1], rows[0])


def test_a_tower_that_saw_nothing_stays_whole(encoder: TextEncoder) -> None:
    state = encoder.state_dict()
    packed = pack_vocabulary(state)
    assert packed.keys() == state.keys() == unpack_vocabulary(packed).keys()
    assert torch.equal(packed[TOKEN_TABLE], state[TOKEN_TABLE])


# The config


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"text_width": 0}, "text.text_width must be at least 1, got 0"),
    ({"text_heads": 0}, "text.text_heads must be at least 1, got 0"),
    ({"context_length": 0}, "text.context_length must be at least 1, got 0"),
    ({"text_layers": 1}, "text.text_layers must be at least 2"),
    ({"text_heads": 3}, "text.text_width=1024 is not divisible by text.text_heads=3"),
]


@pytest.mark.parametrize("changes, message", BAD_FIELDS)
def test_impossible_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        replace(TextConfig(), **changes)


def test_the_default_is_the_tower_of_vit_h_14() -> None:
    with torch.device("meta"):
        tower = TextEncoder().tower
    layer = 12 * 1024**2 + 13 * 1024  # attention, feed-forward, their biases, two norms
    assert sum(p.numel() for p in tower.parameters()) == 23 * layer + (VOCABULARY + 77) * 1024 + 2 * 1024
