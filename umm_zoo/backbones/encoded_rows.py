"""Conversations as rows of tokens with room for their images: what needs a tokenizer, texts and sizes, and no network.

A loader's workers may hold it all: it is pickled without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from umm_zoo.backbones.encoding import encode_all
from umm_zoo.backbones.templates import IGNORE, ChatTemplate, Piece
from umm_zoo.batch import IMAGE_MARKER, Conversation, Grid, Images, Turn
from umm_zoo.errors import UserError


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


Role = Literal["system", "user", "assistant"]
#: The layout of an image of some height and width, in pixels, in a row of so many images.
LayoutRule = Callable[[int, int, int], ImageLayout]


class HasGrid(Protocol):
    """Rule of how images become a grid of tokens."""

    def grid(self, height: int, width: int) -> Grid:
        """That of an image of so many pixels."""


@dataclass(frozen=True)
class WholePatches:
    """Grid of the whole patches of an image, ``patch`` pixels a side."""

    patch: int

    def grid(self, height: int, width: int) -> Grid:
        """Rest is cut off."""
        return Grid(height // self.patch, width // self.patch)


@dataclass(frozen=True)
class SeveralPerCell:
    """One row of ``count`` tokens for each cell of another rule's grid: together they form no grid over the image."""

    cells: HasGrid
    count: int

    def grid(self, height: int, width: int) -> Grid:
        """That row."""
        return Grid(1, self.count * self.cells.grid(height, width).num_cells)


@dataclass(frozen=True)
class GridLayout:
    """Layout of images as nothing but the tokens of their grids."""

    images: HasGrid

    def __call__(self, height: int, width: int, count: int) -> ImageLayout:
        """Of one image."""
        return ImageLayout((self.images.grid(height, width).num_cells,))


class RowRequest(NamedTuple):
    """A conversation to be made a row, whose images have these layouts."""

    turns: tuple[tuple[Role, str], ...]
    layouts: tuple[ImageLayout, ...]
    for_generation: bool = False
    opening: str = ""


class EncodedRow(NamedTuple):
    """Token ids of a row and their labels, ``[L]`` each."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]

    @property
    def num_labels(self) -> int:
        """Tokens to be learnt; the first follows none."""
        return int((self.labels[1:] != IGNORE).sum())


def layouts_of(images: Images, image_counts: Sequence[int], rule: LayoutRule) -> list[tuple[ImageLayout, ...]]:
    """Layouts of the images of each row."""
    left = iter(images)
    return [tuple(rule(image.shape[-2], image.shape[-1], count) for image in islice(left, count)) for count in image_counts]


def requests_of(
    conversations: Iterable[Conversation], layouts: Iterable[tuple[ImageLayout, ...]], for_generation: bool, opening: str = ""
) -> list[RowRequest]:
    """Requests for these conversations, whose images have these ``layouts``."""
    return [
        RowRequest(tuple((turn["role"], turn["text"]) for turn in turns), own, for_generation, opening)
        for turns, own in zip(conversations, layouts, strict=True)
    ]


@dataclass
class RowEncoder:
    """Tokeniser of rows.

    Args:
        tokenizer, template: of the model.
        image_token_id: stands at the places of image tokens.
        max_length: longest row in tokens; longer ones are cut on the right, never through an image. None cuts nothing.
        positions: of the language model; None is any number.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    image_token_id: int
    max_length: int | None
    positions: int | None

    def __call__(self, requests: Sequence[RowRequest]) -> list[EncodedRow | UserError]:
        """Each row, or why it cannot be one; all texts go through the tokenizer in one call."""
        pieces = [self._pieces(request) for request in requests]
        good = [place for place, own in enumerate(pieces) if not isinstance(own, UserError)]
        runs = [[run for image in requests[place].layouts for run in image.runs] for place in good]
        texts = [own for own in pieces if not isinstance(own, UserError)]
        first = self.template.first_ids(self.tokenizer)
        encoded = iter(encode_all(self.tokenizer, texts, self.image_token_id, runs, first) if good else [])
        return [
            own if isinstance(own, UserError) else self._cut(EncodedRow(*next(encoded)), request.for_generation)
            for own, request in zip(pieces, requests, strict=True)
        ]

    def _pieces(self, request: RowRequest) -> list[Piece] | UserError:
        turns, images = [Turn(role=role, text=text) for role, text in request.turns], request.layouts
        if request.for_generation and turns and turns[-1]["role"] == "assistant":
            return UserError("", "an assistant turn at the end", "a question that is left to answer")
        opening = [Piece("text", request.opening)] if request.opening else []
        pieces = [*self.template.render(turns, request.for_generation), *opening]
        markers = sum(piece.kind == "image" for piece in pieces)
        if markers != len(images):
            return UserError("", f"{markers} {IMAGE_MARKER} markers", f"{len(images)}, one for each image of the row")
        left = iter(images)
        return [own for piece in pieces for own in (next(left).pieces if piece.kind == "image" else (piece,))]

    def _cut(self, whole: EncodedRow, for_generation: bool) -> EncodedRow | UserError:
        row = EncodedRow(*(own[: self.max_length] for own in whole))
        lost, found, what = whole.ids[len(row.ids) :], f"{len(whole.ids)} tokens", ""
        if cut := int((lost == self.image_token_id).sum()):
            what = f"{cut} image tokens"
        elif len(lost) and for_generation:
            what = "the end of a question"
        elif len(lost) and whole.num_labels and not row.num_labels:
            what = "every answer"
        if what:
            found = f"{found}, of which max_length {self.max_length} would cut off {what}"
            return UserError("", found, "shorter texts or a larger method.vlm.max_length")
        if for_generation and self.positions is not None and len(whole.ids) > self.positions:
            return UserError("", found, f"at most {self.positions}, the positions of the language model")
        return row


class RowCache:
    """Rows encoded last, by what was requested: a loader asks whether a row fits, and its workers encode it, before the step does.

    Args:
        size: rows that are kept, or four times as many as come at once; those of a few batches.
    """

    def __init__(self, size: int = 1024) -> None:
        self._rows: dict[object, EncodedRow] = {}
        self.size = size

    def get(self, key: object) -> EncodedRow | None:
        """The row; None where it is not known."""
        return self._rows.get(key)

    def add(self, rows: dict[object, EncodedRow]) -> None:
        """Keep rows, in the place of the oldest."""
        self._rows |= rows
        for key in list(islice(self._rows, max(0, len(self._rows) - max(self.size, 4 * len(rows))))):
            del self._rows[key]
