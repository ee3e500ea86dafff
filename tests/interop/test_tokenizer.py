"""Our tokenizer files mean to transformers what open_clip's tokenizer does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vdm.interop.tokenizer import END_ID, read_pad_token, write_tokenizer
from vdm.text.encoder import TextConfig, TextEncoder

PROMPTS = [
    "pushing [something] from left to right", "it's 12 o'clock; don't", "hello! a cat, (a dog) & x_y z-w 3.5m",
    "Cr\u00e8me br\u00fbl\u00e9e \u2014 \u6771\u4eac \U0001f600", "", "  two  spaces ", "UPPER Case", "word " * 100,
]  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("pad", [0, END_ID])
@pytest.mark.parametrize("saved_again", [False, True])
def test_transformers_reads_the_same_tokens(pad: int, saved_again: bool, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path / "t", context_length=20, pad_token_id=pad)
    theirs: Any = CLIPTokenizer.from_pretrained(tmp_path / "t")
    if saved_again:
        theirs.save_pretrained(tmp_path / "again")
        theirs = CLIPTokenizer.from_pretrained(tmp_path / "again")
        assert read_pad_token(tmp_path / "again") == pad
    ours = TextEncoder(TextConfig(text_width=2, text_heads=1, text_layers=2, context_length=20, pad_token_id=pad))
    found = theirs(PROMPTS, padding="max_length", max_length=theirs.model_max_length, truncation=True)["input_ids"]
    assert theirs.model_max_length == 20 and len(theirs) == 49_408
    assert ours.tokens(PROMPTS).tolist() == found


@pytest.mark.parametrize("pad", [0, END_ID])
def test_the_padding_token_is_read_back(pad: int, tmp_path: Path) -> None:
    assert read_pad_token(tmp_path / "nowhere") == 0
    write_tokenizer(tmp_path / "t", context_length=77, pad_token_id=pad)
    assert read_pad_token(tmp_path / "t") == pad
    (tmp_path / "t" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    assert read_pad_token(tmp_path / "t") == END_ID, "as in folders of transformers 4"


def test_padding_follows_the_end() -> None:
    encoder = TextEncoder(TextConfig(text_width=2, text_heads=1, text_layers=2, context_length=5, pad_token_id=7))
    assert encoder.tokens(["a", "", "a a a a a a"]).tolist() == [
        [49406, 320, 49407, 7, 7], [49406, 49407, 7, 7, 7], [49406, 320, 320, 320, 49407],
    ]  # fmt: skip
