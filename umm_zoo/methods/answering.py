"""Answers of methods whose vision-language model gives them as it is."""

from __future__ import annotations

from typing import Protocol

import torch

from umm_zoo.backbones.answers import Answer, Decoding, answer_rows
from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.batch import Batch


class _HasVLM(Protocol):
    @property
    def vlm(self) -> VLMBackbone:
        """The model."""


class AnswersWithVLM:
    """Mixin of methods whose ``vlm`` answers: the capabilities ``Answers`` and ``AnswersInTokens``."""

    @torch.no_grad()
    def answer(self: _HasVLM, batch: Batch, max_new_tokens: int = 64, temperature: float = 0.0) -> list[str]:
        """Answers to a batch of prompts; a row's own last answer is not looked at."""
        return self.vlm.generate(batch.prompts(), batch.images, batch.image_counts, max_new_tokens, temperature)

    def answer_in_tokens(self: _HasVLM, batch: Batch, decoding: Decoding) -> list[Answer] | None:
        """See ``AnswersInTokens``; None where a subclass answers in its own way, or the model is no ``LibraryVLM``."""
        own = getattr(type(self), "answer", None) is not AnswersWithVLM.answer
        return None if own or not isinstance(self.vlm, LibraryVLM) else answer_rows(self.vlm, batch, decoding)
