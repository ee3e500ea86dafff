"""Prompt -> context: open_clip's tokenizer and text tower, read at the penultimate layer, then ln_final."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from vdm.errors import UserError
from vdm.weights import Weights

VOCABULARY = 49_408
TOKEN_TABLE = "tower.token_embedding.weight"


@dataclass(frozen=True)
class TextConfig:
    """Shape of the text tower; the defaults are OpenCLIP ViT-H/14's, whose width is the original's context width.

    `text_layers` counts the last layer too, though the context is read before it (so that layer is never built).
    `pad_token_id` follows the end of the text: 0 is open_clip's, 49407 that of Stable Diffusion 1.
    `text_weights` is what a new run starts from: an open_clip model and tag ("ViT-H-14/laion2b_s32b_b79k", which
    open_clip downloads), an open_clip weight file, a checkpoint folder (of `training.task: text`, say), "shipped" (the
    demo model's), or null (random). `text_trainable` trains the tower with the UNet.
    """

    text_width: int = 1024
    text_heads: int = 16
    text_layers: int = 24
    context_length: int = 77
    pad_token_id: int = 0
    text_trainable: bool = False
    text_weights: str | None = None

    def __post_init__(self) -> None:
        for key in ("text_width", "text_heads", "context_length"):
            if getattr(self, key) < 1:
                raise UserError(f"text.{key} must be at least 1, got {getattr(self, key)}")
        if self.text_layers < 2:
            raise UserError(f"text.text_layers must be at least 2 (the last one is not used), got {self.text_layers}")
        if not 0 <= self.pad_token_id < VOCABULARY:
            raise UserError(f"text.pad_token_id must be at least 0 and below {VOCABULARY}, got {self.pad_token_id}")
        if self.text_width % self.text_heads:
            raise UserError(f"text.text_width={self.text_width} is not divisible by text.text_heads={self.text_heads}")


class TextEncoder(nn.Module):
    """Prompts -> context (B, context_length, text_width): all tokens, the padding too, as the original feeds them."""

    seen_tokens: Tensor

    def __init__(self, config: TextConfig | None = None):
        super().__init__()
        self.config = config = config or TextConfig()
        self.tokenizer = SimpleTokenizer(context_length=config.context_length)
        self.tower = TextTransformer(
            context_length=config.context_length,
            vocab_size=VOCABULARY,
            width=config.text_width,
            heads=config.text_heads,
            layers=config.text_layers - 1,
            proj_type="none",
            output_tokens=True,
        )
        # Opposite directions are the same bag of words: word order must weigh as much as the words from the start.
        nn.init.normal_(self.tower.positional_embedding, std=0.02)
        self.register_buffer("seen_tokens", torch.zeros(VOCABULARY, dtype=torch.bool))

    def forward(self, prompts: Sequence[str]) -> Tensor:
        return self.pooled_and_context(prompts)[1]

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token numbers (B, context_length) int64: start, text, end, padding; a text that is too long is cut."""
        tokens = self.tokenizer(list(prompts))
        lengths = tokens.argmax(dim=1, keepdim=True) + 1  # the end has the highest number
        padding = torch.arange(self.config.context_length) >= lengths
        return tokens.masked_fill(padding, self.config.pad_token_id)

    def pooled_and_context(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The end-of-text token alone (B, text_width), which stands for the whole prompt, and the context."""
        tokens = self.tokens(prompts).to(self.seen_tokens.device, non_blocking=True)
        if self.training:
            self.seen_tokens[tokens.flatten()] = True
        pooled, context = self.tower(tokens)
        return pooled, context


def pack_vocabulary(state: Mapping[str, Tensor], *, shared: Tensor | None = None) -> Weights:
    """Keep only the token rows that training saw; every other token shares one row: `shared`, or their mean.

    A (49408, D) table becomes `token_ids` (n,) and `token_rows` (n+1, D). A tower that saw nothing stays whole.
    """
    weights = Weights.of(state)
    ids = weights["seen_tokens"].nonzero().flatten()
    if not len(ids):
        return weights
    rows = weights[TOKEN_TABLE][ids]
    last = rows.float().mean(0).to(rows) if shared is None else shared
    small = {"token_ids": ids.int(), "token_rows": torch.cat([rows, last[None]])}
    return weights.renamed(lambda name: None if name in (TOKEN_TABLE, "seen_tokens") else name).updated(small)


def unpack_vocabulary(state: Mapping[str, Tensor]) -> Weights:
    """The inverse of `pack_vocabulary`; a state that was not packed is returned as it is."""
    weights = Weights.of(state)
    if "token_ids" not in weights:
        return weights
    ids, rows = weights["token_ids"].long(), weights["token_rows"]
    table = rows[-1].repeat(VOCABULARY, 1)
    table[ids] = rows[:-1]
    seen = torch.zeros(VOCABULARY, dtype=torch.bool)
    seen[ids] = True
    whole = {TOKEN_TABLE: table, "seen_tokens": seen}
    return weights.renamed(lambda name: None if name in ("token_ids", "token_rows") else name).updated(whole)
