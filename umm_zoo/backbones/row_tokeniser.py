"""Rows of conversations as tokens, with room for their images: what needs texts and sizes, and no network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.backbones.encoding import encode
from umm_zoo.backbones.templates import IGNORE, Piece
from umm_zoo.batch import IMAGE_MARKER, Batch, Conversation, Grid, Images
from umm_zoo.errors import UserError

#: Bytes that a template adds to a turn, far more than any does (our choice): rows that are surely short are not tokenised twice.
_PER_TURN = 512
#: Encoded rows that are kept: those of a few batches.
_KEPT = 1024


def _is_learnt(labels: list[int]) -> bool:
    """Whether a row has anything to learn: the first token follows none."""
    return any(label != IGNORE for label in labels[1:])


class ImageLayout(NamedTuple):
    """What stands in a row for one image: runs of image tokens, and the text and special tokens around them.

    Args:
        runs: image tokens of each ``image`` piece.
        pieces: one of the kind ``image`` per run, and what stands around them.
    """

    runs: tuple[int, ...]
    pieces: tuple[Piece, ...] = (Piece("image"),)

    @property
    def most_tokens(self) -> int:
        """No fewer than its tokens; no token is less than a byte."""
        return sum(self.runs) + sum(len(piece.text.encode()) for piece in self.pieces)


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
        rows = self.encode_rows(batch.conversations, layouts, for_generation=False)
        return sum(label != IGNORE for _, labels in rows for label in labels[1:])

    def check_rows(self, batch: Batch, for_generation: bool = False, opening: str = "") -> None:
        """See ``VLMBackbone.check_rows``; texts that may be too long are tokenised."""
        conversations = batch.prompts() if for_generation else batch.conversations
        layouts = self.image_layouts(batch.images, batch.image_counts)
        for row, (conversation, own) in enumerate(zip(conversations, layouts, strict=True)):
            most = sum(len(turn["text"].encode()) + _PER_TURN for turn in conversation) + len(opening.encode())
            if self.max_length is not None and most + sum(image.most_tokens for image in own) > self.max_length:
                self._encode(row, conversation, own, for_generation, opening)

    def image_grids(self, images: Images) -> list[Grid]:
        """``image_grid`` of each image."""
        return [self.image_grid(*image.shape[-2:]) for image in images]

    def image_layout(self, height: int, width: int, count: int) -> ImageLayout:
        """What stands for an image of that many pixels in a row of ``count`` images: the tokens of its grid."""
        return ImageLayout((self.image_grid(height, width).num_cells,))

    def image_layouts(self, images: Images, image_counts: Sequence[int]) -> list[tuple[ImageLayout, ...]]:
        """``image_layout`` of the images of each row."""
        left = iter(images)
        return [
            tuple(self.image_layout(image.shape[-2], image.shape[-1], count) for image in islice(left, count))
            for count in image_counts
        ]

    def encode_rows(
        self,
        conversations: list[Conversation],
        layouts: Sequence[tuple[ImageLayout, ...]],
        for_generation: bool,
        opening: str = "",
    ) -> list[tuple[list[int], list[int]]]:
        """Ids and labels of each row, whose images have these ``layouts``."""
        rows = zip(conversations, layouts, strict=True)
        return [self._encode(row, turns, own, for_generation, opening) for row, (turns, own) in enumerate(rows)]

    @cached_property
    def _encoded(self) -> dict[Any, tuple[list[int], list[int]]]:
        """Rows encoded last, by their content: the loader asks whether a row fits before the step encodes it."""
        return {}

    def _encode(
        self, row: int, conversation: Conversation, images: tuple[ImageLayout, ...], for_generation: bool, opening: str
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of a row whose images have these layouts."""
        key = (tuple((turn["role"], turn["text"]) for turn in conversation), images, for_generation, opening)
        known = self._encoded.get((key, self.max_length))
        if known is None:
            known = self._tokenise(row, conversation, images, for_generation, opening)
            if len(self._encoded) >= _KEPT:
                del self._encoded[next(iter(self._encoded))]
            self._encoded[key, self.max_length] = known
        return known

    def _tokenise(
        self, row: int, conversation: Conversation, images: tuple[ImageLayout, ...], for_generation: bool, opening: str
    ) -> tuple[list[int], list[int]]:
        if for_generation and conversation and conversation[-1]["role"] == "assistant":
            raise UserError("", "an assistant turn at the end", "a question that is left to answer", row=row)
        pieces = [*self.template.render(conversation, for_generation), *([Piece("text", opening)] if opening else [])]
        markers = sum(piece.kind == "image" for piece in pieces)
        if markers != len(images):
            raise UserError("", f"{markers} {IMAGE_MARKER} markers", f"{len(images)}, one for each image of the row", row=row)
        left, runs = iter(images), [run for image in images for run in image.runs]
        pieces = [own for piece in pieces for own in (next(left).pieces if piece.kind == "image" else (piece,))]
        ids, labels = encode(self.tokenizer, pieces, self.image_token_id, runs, self.template.first_ids(self.tokenizer))
        lost = [] if self.max_length is None else ids[self.max_length :]
        if lost and (for_generation or self.image_token_id in lost):
            cut = lost.count(self.image_token_id)
            what = f"{cut} image tokens" if cut else "the end of a question"
            found = f"{len(ids)} tokens, of which max_length {self.max_length} would cut off {what}"
            raise UserError("", found, "shorter texts or a larger method.vlm.max_length", row=row)
        if lost and _is_learnt(labels) and not _is_learnt(labels[: self.max_length]):
            found = f"{len(ids)} tokens, of which max_length {self.max_length} would cut off every answer"
            raise UserError("", found, "shorter texts or a larger method.vlm.max_length", row=row)
        places = getattr(self.text_model.config, "max_position_embeddings", None)
        if for_generation and places is not None and len(ids) > places:
            raise UserError("", f"{len(ids)} tokens", f"at most {places}, the positions of the language model", row=row)
        return ids[: self.max_length], labels[: self.max_length]
