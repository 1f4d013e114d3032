"""Text encoder with one state per token, the condition that text-to-image models are trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.t5 import T5Config, T5EncoderModel

from umm_zoo.backbones.loading import (
    assert_known,
    checked_config,
    find_source,
    load_checkpoint,
    mark_quantized,
    on_meta_device,
    torch_dtype,
)
from umm_zoo.backbones.quantization import assert_writable
from umm_zoo.backbones.tokenizer import TextEncoding, assert_vocabulary, tokenizer_source
from umm_zoo.batch import Tokens
from umm_zoo.errors import Count


class TextEncoder(nn.Module):
    """The encoder of T5 (Raffel et al., 2020, arXiv 1910.10683): bidirectional, one state per token.

    Imagen, PixArt, SD3 and FLUX are conditioned on it. Here a small one is what a tiny decoder is pretrained with, before a bridge
    takes its place.

    Args:
        model: the library's network.
        text: turns strings into token ids.
        max_length: longer texts lose their last words.

    Attributes:
        width: E, of the states.

    Shape:
        - output: ``[B, N, E]``, N being the length of the longest text with its end token; padding is masked, where there is any
    """

    def __init__(self, model: PreTrainedModel, text: TextEncoding, max_length: Count = 64) -> None:
        super().__init__()
        self.model, self.text, self.max_length = model, text, max_length
        self.width: int = model.config.d_model
        assert_vocabulary(text.tokenizer, model.config.vocab_size)

    @classmethod
    def from_config(cls, config: dict[str, Any], max_length: Count = 64, dtype: str = "float32") -> Self:
        """Random weights from the library's config keys (``d_model``, ``num_layers`` …).

        Args:
            config: the keys; the vocabulary's size comes from the tokenizer, which is the shipped one.
            max_length: in tokens.
            dtype: of the weights.

        Raises:
            ValueError: a key is misspelt.
        """
        text = TextEncoding()
        assert_known("T5Config", config, list(T5Config().to_dict()))
        tokens = {key: value for key, value in text.config().items() if key != "bos_token_id"}
        model: Any = T5EncoderModel(T5Config(**{**tokens, **config}))
        return cls(model.to(torch_dtype(dtype)), text, max_length)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        config: dict[str, Any] | None = None,
        max_length: Count = 64,
        dtype: str = "float32",
        quantization: dict[str, Any] | None = None,
    ) -> Self:
        """A folder in transformers' format or a name on the hub. On the meta device with ``config`` given no weights are read.

        Args:
            source: folder or name; a file of the whole T5 loads too, its decoder being left out. The tokenizer is the one inside,
                or the shipped one where a folder holds none.
            config: for the meta device; elsewhere it fills in what the stored configuration leaves open.
            max_length, dtype: see ``from_config``.
            quantization: 8 or 4 bits a weight, in the library's own words, see ``Quantization.read``; for a part that is frozen.

        Raises:
            ValueError: the weights do not fill the network exactly.
        """
        found = find_source(source, T5EncoderModel)
        if on_meta_device():
            if config is not None:
                encoder = cls.from_config(config, max_length, dtype)
            else:
                stored = checked_config(T5EncoderModel, found) or T5Config.from_pretrained(found)
                encoder = cls(T5EncoderModel._from_config(stored), TextEncoding(tokenizer_source(found)), max_length)
            mark_quantized(encoder.model, found, quantization)
            return encoder
        model = load_checkpoint(T5EncoderModel, found, dtype, ("decoder.", "lm_head."), config, quantization)
        return cls(model, TextEncoding(tokenizer_source(found)), max_length)

    def save(self, folder: str | Path) -> None:
        """Write weights and tokenizer in transformers' format, for ``from_pretrained`` here or there."""
        assert_writable(self.model, "TextEncoder.save")
        self.model.save_pretrained(folder)
        self.text.tokenizer.save_pretrained(folder)

    def forward(self, texts: list[str]) -> Tokens:
        """States of every token up to the end token."""
        ids = self.text(texts, self.max_length, trimmed=True)
        real, device = until_end(ids, self.text.tokenizer.eos_token_id), self.model.device
        mask = None if real.all() else real.to(device)
        states: Tensor = self.model(
            input_ids=ids.to(device), attention_mask=None if mask is None else mask.long()
        ).last_hidden_state
        return Tokens(states, mask)


def until_end(ids: Tensor, end: int) -> Tensor:
    """``[B, N]`` bool, True up to and with the first end token; some tokenizers pad with that same token."""
    is_end = (ids == end).long()
    return torch.cumsum(is_end, dim=1) - is_end == 0
