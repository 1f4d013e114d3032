"""Base of backbones that read conversations as tokens of one library tokenizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.backbones.encoded_rows import (
    EncodedRow,
    ImageLayout,
    LayoutRule,
    RowCache,
    RowEncoder,
    RowRequest,
    layouts_of,
    requests_of,
)
from umm_zoo.backbones.preparation import Asked, Preparation
from umm_zoo.backbones.row_preparation import RowPreparation
from umm_zoo.batch import Batch, Conversation, Grid, Images
from umm_zoo.errors import UserError

#: Bytes that a template adds to a turn, far more than any does (our choice): rows that are surely short are not tokenised twice.
_PER_TURN = 512


class RowTokeniser(VLMBackbone):
    """Base class of backbones that read conversations as tokens of one library tokenizer.

    Attributes:
        max_length: longest row in tokens; longer ones are cut on the right, never through an image. None cuts nothing.
        image_token_id: stands at the places of image tokens; it may lie outside the vocabulary.
    """

    max_length: int | None = None
    image_token_id: int

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""

    @property
    @abstractmethod
    def text_model(self) -> Any:
        """The library's language model without its output layer."""

    def count_labels(self, batch: Batch) -> int:
        """See ``VLMBackbone.count_labels``; texts are tokenised, no network runs."""
        layouts = self.image_layouts(batch.images, batch.image_counts)
        return sum(row.num_labels for row in self.encode_rows(batch.conversations, layouts, for_generation=False))

    def check_rows(self, batch: Batch, for_generation: bool = False, opening: str = "") -> None:
        """See ``VLMBackbone.check_rows``; texts that may be too long are tokenised."""
        conversations = batch.prompts() if for_generation else batch.conversations
        layouts = self.image_layouts(batch.images, batch.image_counts)
        doubtful = dict[int, RowRequest]()
        for row, request in enumerate(requests_of(conversations, layouts, for_generation, opening)):
            most = sum(len(text.encode()) + _PER_TURN for _, text in request.turns) + len(opening.encode())
            if self.max_length is not None and most + sum(image.most_tokens for image in request.layouts) > self.max_length:
                doubtful[row] = request
        self._encode(list(doubtful.values()), list(doubtful))

    def image_grids(self, images: Images) -> list[Grid]:
        """``image_grid`` of each image."""
        return [self.image_grid(*image.shape[-2:]) for image in images]

    def image_layout(self, height: int, width: int, count: int) -> ImageLayout:
        """What stands for an image of that many pixels in a row of ``count`` images: the tokens of its grid."""
        return ImageLayout((self.image_grid(height, width).num_cells,))

    def image_layouts(self, images: Images, image_counts: Sequence[int]) -> list[tuple[ImageLayout, ...]]:
        """``image_layout`` of the images of each row."""
        return layouts_of(images, image_counts, self.image_layout)

    def encode_rows(
        self,
        conversations: list[Conversation],
        layouts: Sequence[tuple[ImageLayout, ...]],
        for_generation: bool,
        opening: str = "",
    ) -> list[EncodedRow]:
        """Ids and labels of each row, whose images have these ``layouts``.

        Raises:
            UserError: names the first row that cannot be one.
        """
        return self._encode(requests_of(conversations, layouts, for_generation, opening), range(len(conversations)))

    @property
    def row_encoder(self) -> RowEncoder:
        """What makes rows of conversations."""
        positions = getattr(self.text_model.config, "max_position_embeddings", None)
        return RowEncoder(self.tokenizer, self.template, self.image_token_id, self.max_length, positions)

    @property
    def layout_rule(self) -> LayoutRule | None:
        """``image_layout`` without the model, for a loader's workers; None where there is no such rule."""
        return None

    def preparation(self, asked: Callable[[Batch], Iterable[Asked]]) -> Preparation | None:
        """See ``VLMBackbone.preparation``: rows as tokens."""
        rule = self.layout_rule
        return None if rule is None else RowPreparation(self.row_encoder, rule, asked, self.known_rows)

    @cached_property
    def known_rows(self) -> RowCache:
        """Rows encoded last, by request and ``max_length``."""
        return RowCache()

    def _encode(self, requests: Sequence[RowRequest], rows: Sequence[int]) -> list[EncodedRow]:
        """The requested rows, of which those that are not known are encoded; ``rows`` are their numbers, for messages."""
        found = {request: self.known_rows.get((request, self.max_length)) for request in requests}
        if new := [request for request, row in found.items() if row is None]:
            made = dict(zip(new, self.row_encoder(new), strict=True))
            for request, number in zip(requests, rows, strict=True):
                if isinstance(refused := made.get(request), UserError):
                    refused.row = number
                    raise refused
            good = {request: own for request, own in made.items() if isinstance(own, EncodedRow)}
            self.known_rows.add({(request, self.max_length): own for request, own in good.items()})
            found |= good
        return [row for request in requests if (row := found[request]) is not None]
