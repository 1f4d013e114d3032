"""Tokenizers: the shipped one, and those of public models; token ids as text towers take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from umm_zoo.conversation import IMAGE_MARKER
from umm_zoo.errors import several

#: The tokenizer that is shipped with the package (see the card beside it).
SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "tokenizer"


def load_tokenizer(source: str | None = None) -> PreTrainedTokenizerBase:
    """The shipped byte-level tokenizer, or that of a public model.

    Args:
        source: None for the shipped one (1,024 tokens, with the special tokens of Qwen2.5-VL and ``<image>``; end of text is
            ``<|im_end|>``, as in Qwen's chat models; padding has its own token), else a model name or folder.

    Raises:
        FileNotFoundError: no tokenizer there.
    """
    if source is None:
        return PreTrainedTokenizerFast(
            tokenizer_file=str(SHIPPED / "tokenizer.json"),
            eos_token="<|im_end|>",
            pad_token="<|pad|>",
            extra_special_tokens=[
                "<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>",
                "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<image>",
            ],
            clean_up_tokenization_spaces=False,
        )  # fmt: skip
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)  # unsaid, it would ask on a terminal
    except Exception as error:  # the tokenizers library raises the bare class over files that are none
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(f"tokenizer: found '{source}', expected a model name or folder with one ({reason})") from error
    if tokenizer.pad_token is None:  # Llama and Vicuna have none; padding is masked everywhere, so any token will do
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of ``<image>``, which is added to a tokenizer that has none."""
    if IMAGE_MARKER not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_MARKER]}, replace_extra_special_tokens=False)
    return tokenizer.get_vocab()[IMAGE_MARKER]


def is_here(source: str | None) -> bool:
    """Whether a tokenizer is on this machine, so that a check may read it: the shipped one, or a folder."""
    return source is None or Path(source).is_dir()


def assert_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings; spare embeddings are usual.

    Raises:
        ValueError: an id has no embedding.
    """
    ids = tokenizer.get_vocab()
    beyond = sorted(ids.items(), key=lambda item: item[1])[-1]
    if beyond[1] >= size:
        added = f", such as '{beyond[0]}'; added tokens need rows of their own: model.resize_token_embeddings, then save both"
        raise ValueError(f"tokenizer: found ids up to {beyond[1]}, expected fewer than the language model's {size}{added}")


def tokenizer_source(source: str | Path, stated: str | None = None) -> str | None:
    """Path of a checkpoint's tokenizer: as stated, else in the checkpoint itself, else (None) the shipped one."""
    own = not Path(source).is_dir() or any(Path(source).glob("tokenizer*"))
    return stated or (str(source) if own else None)


class TextEncoding:
    """Token ids of texts, each ended by the end token and padded to the tower's full length, as CLIP and SigLIP are trained.

    Args:
        source: of the tokenizer, see ``load_tokenizer``.
    """

    def __init__(self, source: str | None = None) -> None:
        self.tokenizer = load_tokenizer(source)

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
        assert_vocabulary(self.tokenizer, text_config.vocab_size)
        end = self.tokenizer.eos_token_id
        # 2 is the wrong value of CLIP's first public configs; the library then pools at the largest id, which is the end token
        if text_config.eos_token_id not in (end, 2):
            raise ValueError(f"tokenizer: found id {end} at the end, expected the text tower's {text_config.eos_token_id}")

    def length(self, text: str) -> int:
        """Tokens of a text with its end token."""
        ids = self.tokenizer(text)["input_ids"]
        return len(ids) + (not ids or ids[-1] != self.tokenizer.eos_token_id)

    def __call__(self, texts: list[str], length: int, trimmed: bool = False) -> Tensor:
        """Ids ``[len(texts), length]``, or as long as the longest of them if ``trimmed``; longer texts lose words, not the end."""
        several("texts", texts)
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        longest = 1
        rows = torch.full((len(texts), length), pad, dtype=torch.long)
        for row, ids in enumerate(self.tokenizer(texts)["input_ids"] if texts else []):
            ids = ids[:-1] if ids and ids[-1] == end else ids  # some tokenizers add it, some do not
            ids = [*ids[: length - 1], end]
            rows[row, : len(ids)] = torch.tensor(ids)
            longest = max(longest, len(ids))
        return rows[:, :longest] if trimmed else rows
