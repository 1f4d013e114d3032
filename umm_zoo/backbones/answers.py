"""Answers as rows of tokens: drawn from seeds of their own, watched while they come, and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError


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
        seeds: of each row, whose answer depends on the row and its seed alone; not looked at at temperature 0. None: torch's own
            generator.
        top_p: see ``generation.decode``.
        watch: called with a row and its answer so far, after every token; whether the answer shall go on.
    """

    max_new_tokens: int
    temperature: float
    seeds: Sequence[int] | None
    top_p: float = 1.0
    watch: Callable[[int, Answer], bool] | None = None

    def generators(self, device: torch.device) -> list[torch.Generator] | None:
        """One of each row, where they are needed."""
        if not self.temperature or self.seeds is None:
            return None
        return [torch.Generator(device).manual_seed(seed) for seed in self.seeds]


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
    rows = WatchedAnswers(counts, decoding.watch, vlm.row_encoder.positions, vlm.text_of)
    generators = decoding.generators(inputs.embeddings.device)
    vlm.sample_from(inputs, 1, decoding.max_new_tokens, decoding.temperature, generators, top_p=decoding.top_p, watch=rows)
    return rows.answers()


#: Writes answers: a vision-language model, or a method that has its own way.
Writer = LibraryVLM | AnswersInTokens


def written_by(writer: Writer, batch: Batch, decoding: Decoding) -> list[Answer]:
    """Answers of either.

    Raises:
        UserError: the method gives its answers as a whole.
    """
    if isinstance(writer, LibraryVLM):
        return answer_rows(writer, batch, decoding)
    if (answers := writer.answer_in_tokens(batch, decoding)) is None:
        raise UserError("method", f"a {type(writer).__name__}, which answers as a whole", "one that answers token by token")
    return answers


class WatchedAnswers:
    """The watch over the rows of ``decode``, and their answers.

    Args:
        num_prompt_tokens: of each row.
        watch: see ``Decoding``.
        positions: that the model has; no row grows beyond them.
        text_of: gives the text of tokens.
    """

    def __init__(
        self,
        num_prompt_tokens: Sequence[int],
        watch: Callable[[int, Answer], bool] | None,
        positions: int | None,
        text_of: Callable[[Sequence[int]], str],
    ) -> None:
        self.num_prompt_tokens, self.watch, self.positions, self.text_of = num_prompt_tokens, watch, positions, text_of
        self.ids: list[list[int]] = [[] for _ in num_prompt_tokens]
        self.ended = [False] * len(self.ids)

    def answer(self, row: int) -> Answer:
        """The answer so far."""
        return Answer(tuple(self.ids[row]), self.num_prompt_tokens[row], self.ended[row], self.text_of)

    def answers(self) -> list[Answer]:
        """Those of all rows."""
        return [self.answer(row) for row in range(len(self.ids))]

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
