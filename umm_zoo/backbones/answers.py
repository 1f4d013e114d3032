"""Answers as rows of tokens: drawn from seeds of their own, watched while they come, and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.batch import Batch


@dataclass(frozen=True)
class Answer:
    """An answer, or as much of it as is there.

    Args:
        ids: its tokens, the one that ends it included.
        num_prompt_tokens: tokens before it, those of images too.
        ended: whether the model itself has ended it.
        text_of: gives the text of tokens, as they are.
    """

    ids: Sequence[int]
    num_prompt_tokens: int
    ended: bool
    text_of: Callable[[Sequence[int]], str]

    @property
    def said(self) -> str:
        """Its words, with the blanks around them."""
        return self.text_of(self.ids)

    @property
    def text(self) -> str:
        """Its words."""
        return self.said.strip()


@dataclass(frozen=True)
class Decoding:
    """How the answers to the B rows of a batch are drawn.

    Args:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token.
        seeds: of each row, whose answer depends on the row and its seed alone; not looked at at temperature 0.
        top_p: see ``generation.decode``.
        watch: called with a row and its answer so far, after every token; whether the answer shall go on.
    """

    max_new_tokens: int
    temperature: float
    seeds: Sequence[int]
    top_p: float = 1.0
    watch: Callable[[int, Answer], bool] | None = None


@runtime_checkable
class AnswersInTokens(Protocol):
    """A method whose answers can be watched while they come (capability; ``outputs.Answers`` has the others)."""

    def answer_in_tokens(self, batch: Batch, decoding: Decoding) -> list[Answer] | None:
        """One answer per row, whose own last answer is not looked at; None where its model gives answers as a whole."""


@torch.no_grad()
def answer_rows(vlm: LibraryVLM, batch: Batch, decoding: Decoding) -> list[Answer]:
    """Answers of a vision-language model to a batch of prompts; none grows beyond the positions that the model has."""
    inputs = vlm.embed(batch.prompts(), batch.images, batch.image_counts, for_generation=True)
    counts = inputs.attention_mask.sum(dim=1).tolist()
    rows = _Rows(vlm, counts, decoding.watch)
    device = inputs.embeddings.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in decoding.seeds] if decoding.temperature else None
    vlm.sample_from(inputs, 1, decoding.max_new_tokens, decoding.temperature, generators, top_p=decoding.top_p, watch=rows)
    return [rows.answer(row) for row in range(len(counts))]


class _Rows:
    """The watch over the rows of ``decode``."""

    def __init__(self, vlm: LibraryVLM, num_prompt_tokens: Sequence[int], watch: Callable[[int, Answer], bool] | None) -> None:
        self.vlm, self.num_prompt_tokens, self.watch = vlm, num_prompt_tokens, watch
        self.positions = vlm.row_encoder.positions
        self.ids: list[list[int]] = [[] for _ in num_prompt_tokens]
        self.ended = [False] * len(self.ids)

    def answer(self, row: int) -> Answer:
        """The answer so far."""
        return Answer(tuple(self.ids[row]), self.num_prompt_tokens[row], self.ended[row], self.vlm.text_of)

    def __call__(self, tokens: Tensor, kept: Tensor, running: Tensor) -> Tensor:
        """See ``generation.Watch``."""
        on = running.tolist()
        for row, (token, own) in enumerate(zip(tokens.tolist(), kept.tolist(), strict=True)):
            if own:
                self.ids[row].append(token)
                self.ended[row] = not on[row]
                room = self.positions is None or self.num_prompt_tokens[row] + len(self.ids[row]) < self.positions
                goes_on = self.watch is None or self.watch(row, self.answer(row))
                on[row] = on[row] and room and goes_on
        return torch.tensor(on, device=running.device)
