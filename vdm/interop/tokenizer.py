"""CLIP's tokenizer as files that transformers reads, from the vocabulary that open_clip ships; and their check.

open_clip pads with token 0, whose name is "!"; the one that ends a word, "!</w>", is another. transformers needs a
padding token by name, and then reads a "!" of a prompt as padding: in files written here only one that stands alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from open_clip.tokenizer import SimpleTokenizer

from vdm.errors import UserError
from vdm.interop.model import read_json, write_json

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
END_ID = 49_407


def write_tokenizer(folder: Path, *, context_length: int, pad_token_id: int) -> None:
    """vocab.json, merges.txt and tokenizer_config.json."""
    folder.mkdir(parents=True)
    tokenizer = SimpleTokenizer(context_length=context_length)
    words = json.dumps(_vocabulary(tokenizer), ensure_ascii=False)
    (folder / "vocab.json").write_text(words, encoding="utf-8")
    merges = sorted(tokenizer.bpe_ranks, key=lambda pair: tokenizer.bpe_ranks[pair])
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    alone = {"content": PAD, "single_word": True, "lstrip": False, "rstrip": False, "normalized": False}
    pad = END if pad_token_id == END_ID else {"__type": "AddedToken", **alone, "special": True}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", {**settings, **special})


def _vocabulary(tokenizer: SimpleTokenizer) -> dict[str, int]:
    """CLIP's tokens and their numbers, the two marks under the names that transformers has for them."""
    words = list(tokenizer.encoder)
    return {word: i for i, word in enumerate([*words[:-2], START, END])}


def read_pad_token(folder: Path) -> int:
    """The number of the token that a folder of tokenizer files pads with; 0 where there is no such folder.

    Raises `UserError` where its vocabulary is not CLIP's, for then the text tower is not one of CLIP's.
    """
    vocabulary = _stored_vocabulary(folder)
    if vocabulary is None:
        return 0
    ours = _vocabulary(SimpleTokenizer())
    if any(vocabulary.get(word) != i for word, i in ours.items()):
        raise UserError(f"{folder} does not hold CLIP's vocabulary, the only one that this model reads; give another")
    pad: object = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            pad = pad or read_json(folder / name).get("pad_token")
    word = pad.get("content") if isinstance(pad, dict) else pad
    return vocabulary.get(str(word), 0)


def _stored_vocabulary(folder: Path) -> dict[str, int] | None:
    if (folder / "vocab.json").is_file():
        return read_json(folder / "vocab.json")
    if not (folder / "tokenizer.json").is_file():
        return None
    tree = read_json(folder / "tokenizer.json")
    added = {token["content"]: token["id"] for token in tree.get("added_tokens", [])}
    stored: dict[str, int] = {**tree.get("model", {}).get("vocab", {}), **added}
    return stored
