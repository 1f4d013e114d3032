"""Token ids of strings, as the text towers of contrastive encoders take them."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from umm_zoo.backbones.tokenizer import load_tokenizer


class TextEncoding:
    """Texts, each ended by the end token and padded to the tower's full length (what CLIP and SigLIP are trained with).

    Args:
        tokenizer: with an end and a padding token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, source: str | None) -> Self:
        """The tokenizer of a name or folder; None is the shipped one."""
        return cls(load_tokenizer(source))

    def config(self) -> dict[str, Any]:
        """The tokenizer's sizes and special tokens, as config keys of the library's text towers."""
        tokens = self.tokenizer
        return {
            "vocab_size": len(tokens),
            "bos_token_id": tokens.bos_token_id,
            "eos_token_id": tokens.eos_token_id,
            "pad_token_id": tokens.pad_token_id,
        }

    def assert_fits(self, text_config: Any) -> None:
        """Refuse a tokenizer that is not the text tower's.

        Raises:
            ValueError: it has more tokens than the tower, or the tower pools at another end token.
        """
        own, end = len(self.tokenizer), self.tokenizer.eos_token_id
        # 2 is the wrong value of CLIP's first public configs; the library then pools at the largest id, which is the end token
        if own > text_config.vocab_size or text_config.eos_token_id not in (end, 2):
            expected = f"the text tower's {text_config.vocab_size} with id {text_config.eos_token_id} at the end"
            raise ValueError(f"tokenizer: found {own} tokens with id {end} at the end, expected {expected}")

    def __call__(self, texts: list[str], length: int, trimmed: bool = False) -> Tensor:
        """Ids ``[len(texts), length]``, or as long as the longest of them if ``trimmed``; longer texts lose words, not the end."""
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        longest = 1
        rows = torch.full((len(texts), length), pad, dtype=torch.long)
        for row, ids in enumerate(self.tokenizer(texts)["input_ids"] if texts else []):
            ids = ids[:-1] if ids and ids[-1] == end else ids  # some tokenizers add it, some do not
            ids = [*ids[: length - 1], end]
            rows[row, : len(ids)] = torch.tensor(ids)
            longest = max(longest, len(ids))
        return rows[:, :longest] if trimmed else rows
