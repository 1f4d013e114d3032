"""Packed sequences: tokens, positions, experts and places of loss of rows of texts and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from umm_zoo.blocks.packed_masks import PackedMask, Split

#: ``text``; ``seen``: an image as the vision tower reads it; ``clean``: its latent; ``noise``: a latent that is generated.
ItemKind = Literal["text", "seen", "clean", "noise"]
#: Numbers of the experts, and of padding, which is nobody's.
UNDERSTANDING, GENERATION, NOBODY = 0, 1, -1


class Item(NamedTuple):
    """A text or an image of a row.

    Args:
        kind: what it is.
        ids: words of a text, without what opens and closes it.
        num_tokens: of an image, without the two around it.
        learnt: whether a text is an answer, whose words and end are learnt.
        dropped: whether it is left out, as dropout of conditions does: an image keeps its position, a text leaves none.
    """

    kind: ItemKind
    ids: Sequence[int] = ()
    num_tokens: int = 0
    learnt: bool = False
    dropped: bool = False


class Marks(NamedTuple):
    """Token ids around texts and images; in Bagel's release those of ``<|im_start|>`` and ``<|im_end|>`` around every text, of
    ``<|vision_start|>`` and ``<|vision_end|>`` around every image.
    """

    text_start: int
    text_end: int
    image_start: int
    image_end: int


@dataclass(frozen=True)
class SequencePlan:
    """Rows of items as padded sequences, on the CPU.

    Text has a position per token; an image and its marks share one, and one that is generated leaves the counter where it was.
    Text, tokens of the vision tower and all marks go to the understanding expert, latents to the generation expert (Bagel's
    released ``dataset_base.py`` and ``bagel.py``).

    Shape:
        - token_ids: ``[B, L]``, 0 in the place of what is no token of text
        - route, positions: ``[B, L]``; a route is the number of an expert, or ``NOBODY``
        - places: by kind of image, numbers in ``[B * L]`` of its tokens, image after image
        - label_places, labels: ``[K]``, whose states predict which token
        - next_positions: ``[B]``, where the next item of each row stands
    """

    token_ids: Tensor
    route: Tensor
    positions: Tensor
    mask: PackedMask
    places: dict[str, Tensor]
    label_places: Tensor
    labels: Tensor
    next_positions: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[Item]], marks: Marks, starts: Sequence[int] | None = None) -> SequencePlan:
        """The plan of rows.

        Args:
            rows: items of each row.
            marks: token ids around them.
            starts: positions that rows begin with; None is 0.
        """
        made = [_Row(marks, start) for start in starts or [0] * len(rows)]
        for own, items in zip(made, rows, strict=True):
            for item in items:
                own.add(item)
        longest = max((len(own.ids) for own in made), default=0)
        shifted = [(longest * number, own) for number, own in enumerate(made)]
        kinds: tuple[ItemKind, ...] = ("seen", "clean", "noise")
        return cls(
            token_ids=_padded([own.ids for own in made], longest, 0),
            route=_padded([own.route for own in made], longest, NOBODY),
            positions=_padded([own.positions for own in made], longest, 0),
            mask=PackedMask([own.splits for own in made]),
            places={kind: _numbers(begin + place for begin, own in shifted for place in own.places[kind]) for kind in kinds},
            label_places=_numbers(begin + place for begin, own in shifted for place in own.label_places),
            labels=_numbers(chain.from_iterable(own.labels for own in made)),
            next_positions=_numbers(own.position for own in made),
        )

    @property
    def real(self) -> Tensor:
        """``[B, L]`` bool, False on padding."""
        return self.route != NOBODY

    @property
    def text_places(self) -> Tensor:
        """Numbers in ``[B * L]`` of the tokens of text, marks among them."""
        images = torch.zeros(self.route.numel(), dtype=torch.bool)
        images[torch.cat(list(self.places.values()))] = True
        return (self.real.flatten() & ~images).nonzero()[:, 0]


class _Row:
    """A row as it grows."""

    def __init__(self, marks: Marks, start: int) -> None:
        self.marks, self.position = marks, start
        self.ids: list[int] = []
        self.route: list[int] = []
        self.positions: list[int] = []
        self.splits: list[Split] = []
        self.places: dict[str, list[int]] = {"seen": [], "clean": [], "noise": []}
        self.label_places: list[int] = []
        self.labels: list[int] = []

    def add(self, item: Item) -> None:
        if item.dropped:
            self.position += item.kind in ("seen", "clean")
        elif item.kind == "text":
            self._add_text(item)
        else:
            self._add_image(item)

    def _add_text(self, item: Item) -> None:
        begin, ids = len(self.ids), [self.marks.text_start, *item.ids, self.marks.text_end]
        if item.learnt:
            self.label_places += range(begin, begin + len(ids) - 1)
            self.labels += ids[1:]
        self.ids += ids
        self.route += [UNDERSTANDING] * len(ids)
        self.positions += range(self.position, self.position + len(ids))
        self.splits.append(Split("causal", len(ids)))
        self.position += len(ids)

    def _add_image(self, item: Item) -> None:
        begin, length = len(self.ids), item.num_tokens + 2
        self.places[item.kind] += range(begin + 1, begin + 1 + item.num_tokens)
        self.ids += [self.marks.image_start, *[0] * item.num_tokens, self.marks.image_end]
        own = UNDERSTANDING if item.kind == "seen" else GENERATION
        self.route += [UNDERSTANDING, *[own] * item.num_tokens, UNDERSTANDING]
        self.positions += [self.position] * length
        self.splits.append(Split("noise" if item.kind == "noise" else "full", length))
        self.position += item.kind != "noise"


def _padded(rows: list[list[int]], longest: int, value: int) -> Tensor:
    padded = [[*row, *[value] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long).view(len(rows), longest)


def _numbers(values: object) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)  # type: ignore[call-overload]
