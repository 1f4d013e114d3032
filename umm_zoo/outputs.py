"""Outputs of validation for metrics and callbacks, and the capabilities that a method may have.

Capabilities are protocols of one or two functions. ``generate``, sample callbacks, benchmarks and rewards ask for them and for
nothing else, so that any method that has the function can be used, a stranger's too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from umm_zoo.batch import Batch, Images, Tokens
from umm_zoo.errors import UserError

#: Outputs that cost a further pass of the model; they are made only where a metric of the run reads them.
ON_REQUEST = frozenset({"attention", "unchanged"})

#: Outputs that hold an image per row.
IMAGES = ("generated", "references", "round_trips", "unchanged", "unchanged_references", "from_true_captions")


class TokenCount(NamedTuple):
    """Tokens of one kind that a training batch was made of; tensors ``[]`` where only the device knows."""

    useful: int | Tensor  #: what the rows hold
    computed: int | Tensor  #: with padding, and with what stands in where there is nothing

    @classmethod
    def of(cls, tokens: Tokens) -> TokenCount:
        """Those of a padded set."""
        computed = tokens.values.shape[:2].numel()
        return cls(computed if tokens.mask is None else tokens.mask.sum(), computed)


#: By kind: ``text`` (padding of a sequence belongs to it), ``image``, ``query``, or a name of one's own.
TokenCounts = Mapping[str, TokenCount]


def sequence_counts(attention_mask: Tensor, image_mask: Tensor) -> dict[str, TokenCount]:
    """Tokens of a language model's sequences, of two masks ``[B, L]``; nothing waits for the device."""
    real, image = attention_mask.sum(), image_mask.sum()
    return {"text": TokenCount(real - image, attention_mask.numel() - image), "image": TokenCount(image, image)}


def stand_in_counts(counts: TokenCounts) -> dict[str, TokenCount]:
    """The same tokens, computed for nothing."""
    return {kind: TokenCount(0, count.computed) for kind, count in counts.items()}


def add_counts(*counts: TokenCounts) -> dict[str, TokenCount]:
    """Sums by kind."""
    kinds = dict.fromkeys(kind for own in counts for kind in own)
    pairs = {kind: zip(*(own[kind] for own in counts if kind in own), strict=True) for kind in kinds}
    return {kind: TokenCount(*(sum(column) for column in columns)) for kind, columns in pairs.items()}


@dataclass
class QueryAttention:
    """Mean attention that queries pay to one token of a kind, before and after the logarithm, and over how many rows.

    Shape:
        - bias: scalar, attention to a token of the image minus attention to a token of text; log_bias: of the logarithms.
    """

    bias: Tensor
    log_bias: Tensor
    num_rows: int


@dataclass
class Outputs:
    """Outputs of ``validation_step`` for a batch of B rows. A field that was not made is None.

    Images are lists of B, ``[3, H, W]`` each, of any sizes; a stack is taken apart.

    Args:
        scalars: losses and rates by name, each a mean over something.
        counts: over how many of what a scalar is a mean; one that is not named counts each row once.
        answers: B texts.
        nll, num_tokens: ``[B]``, sum of the negative log-likelihoods of a row's answer tokens in nats, and their number.
        generated: images in [-1, 1], what the method made of each row: the requested image, or a reconstruction.
        references: what ``generated`` should be; None where that is ``Batch.targets``.
        round_trips: the references through the codec alone: the best that could be.
        unchanged, unchanged_references: edits generated from the same noise with an instruction to change nothing; the truth.
        from_true_captions: images generated from the true captions: the ceiling of those from the model's own.
        caption_tokens, rewards: ``[B]``; the first are lengths of the captions in ``answers``.
        codes, tokens: B of ``[N, D]`` each: long, what a quantizer made of an image; what a reader of those codes gets.
        image_features, text_features: ``[B, F]``.
        attention: how far queries look at the image rather than at the text.
        columns: images by name, in place of input, generated and reference in a sample grid.
    """

    scalars: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    answers: list[str] | None = None
    nll: Tensor | None = None
    num_tokens: Tensor | None = None
    generated: list[Tensor] | None = None
    references: list[Tensor] | None = None
    round_trips: list[Tensor] | None = None
    unchanged: list[Tensor] | None = None
    unchanged_references: list[Tensor] | None = None
    from_true_captions: list[Tensor] | None = None
    caption_tokens: Tensor | None = None
    rewards: Tensor | None = None
    codes: list[Tensor] | None = None
    tokens: list[Tensor] | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    attention: QueryAttention | None = None
    columns: dict[str, list[Tensor]] | None = None

    def __post_init__(self) -> None:
        for name in IMAGES:
            if (images := getattr(self, name)) is not None:
                setattr(self, name, list(images))  # of a stack: views of it
        if self.columns is not None:
            self.columns = {name: list(images) for name, images in self.columns.items()}

    def references_of(self, batch: Batch) -> list[Tensor] | None:
        """Images that ``generated`` should be."""
        if self.references is None:
            return batch.requested if all(batch.has_target) else None
        return self.references


#: Fields that a metric may read and a method declare; every other name is that of a scalar.
FIELDS = frozenset(f.name for f in fields(Outputs)) - {"scalars", "counts"}


def in_groups(step: Callable[[Batch], Outputs], batch: Batch, keys: Sequence[Hashable]) -> Outputs:
    """Outputs of a batch where ``step`` takes rows of equal keys alone (of images of one size, say), in the order of the rows.

    A field, or a column, that a group lacks is not made. Scalars are means over all that the groups count.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    if len(groups) <= 1:
        return step(batch)
    parts, sizes = [step(batch.select(rows)) for rows in groups.values()], [len(rows) for rows in groups.values()]
    place = {row: place for place, row in enumerate(row for rows in groups.values() for row in rows)}
    order = [place[row] for row in range(len(batch))]
    found = Outputs(*_means(parts, sizes))
    for name in FIELDS - {"attention", "columns"}:
        values = [getattr(part, name) for part in parts]
        if all(value is not None for value in values):
            setattr(found, name, _in_order(values, order))
    columns = [part.columns or {} for part in parts]
    if shared := [name for name in columns[0] if all(name in own for own in columns)]:
        found.columns = {name: _in_order([own[name] for own in columns], order) for name in shared}
    seen = [part.attention for part in parts if part.attention is not None]
    if len(seen) == len(parts):
        num_rows = sum(one.num_rows for one in seen)
        values = [one.num_rows / max(1, num_rows) * torch.stack([one.bias, one.log_bias]) for one in seen]
        bias, log_bias = torch.stack(values).sum(dim=0)
        found.attention = QueryAttention(bias, log_bias, num_rows)
    return found


def _in_order(values: Sequence[Any], order: Sequence[int]) -> Any:
    """Entries of rows, group after group, in the order of the rows."""
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))[list(order)]
    joined = [entry for value in values for entry in value]
    return [joined[place] for place in order]


def _means(parts: Sequence[Outputs], sizes: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Scalars of groups together, and over how many each is a mean, where that is not the rows of all."""
    scalars, counts = dict[str, Tensor](), dict[str, float]()
    for name in dict.fromkeys(name for part in parts for name in part.scalars):
        own = [
            (part.scalars[name], part.counts.get(name, size))
            for part, size in zip(parts, sizes, strict=True)
            if name in part.scalars
        ]
        total = sum(count for _, count in own)
        scalars[name] = torch.stack([value * (count / (total or 1)) for value, count in own]).sum()
        if total != sum(sizes):
            counts[name] = total
    return scalars, counts


@dataclass(frozen=True)
class Wanted:
    """Extent of a validation; the run's callbacks set it before the first one.

    Args:
        on_request: names among ``ON_REQUEST`` that a metric reads.
        max_new_tokens: longest answer (our choice: enough for one clause); 0 makes none.
        num_generated_batches: batches of each validation whose images are generated; None is all.
    """

    on_request: frozenset[str] = frozenset()
    max_new_tokens: int = 16
    num_generated_batches: int | None = None

    def generates(self, batch_idx: int) -> bool:
        """Whether images of this batch are to be generated."""
        return self.num_generated_batches is None or batch_idx < self.num_generated_batches


@dataclass(frozen=True)
class Sampling:
    """Settings of generation, where they are not the method's own.

    Args:
        num_steps: of the sampler.
        guidance: how strongly the request is followed; 1 is no guidance.
        image_guidance: how strongly the input images are, for methods that guide towards them apart.
        size: height and width in pixels.

    Raises:
        UserError: fewer than one step or pixel, or a guidance that is not finite.
    """

    num_steps: int | None = None
    guidance: float | None = None
    image_guidance: float | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 1:
            raise UserError("num_steps", f"{self.num_steps}", "1 or more")
        for name in ("guidance", "image_guidance"):
            if not math.isfinite(getattr(self, name) or 0):
                raise UserError(name, f"{getattr(self, name)}", "a finite number")
        if self.size is not None and min(self.size) < 1:
            raise UserError("size", f"{self.size[0]} x {self.size[1]} px", "1 or more")


@runtime_checkable
class Answers(Protocol):
    """A method that answers prompts in words."""

    def answer(self, batch: Batch, max_new_tokens: int = 64, temperature: float = 0.0) -> list[str]:
        """One answer per row; a row's own last answer is not looked at."""


@runtime_checkable
class Draws(Protocol):
    """A method that makes the image that a row asks for."""

    def generate(self, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Tensor]:
        """An image ``[3, H, W]`` in [-1, 1] of each row, which depends on the row and its seed alone."""


@runtime_checkable
class Reconstructs(Protocol):
    """A method that makes an image again from what its model makes of it."""

    def reconstruct(self, images: Images, seed: int = 0) -> list[Tensor]:
        """M images ``[3, H, W]`` of any sizes again, in [-1, 1]; one image at a time depends on itself and the seed alone."""

    def round_trip(self, images: Images) -> list[Tensor]:
        """The best that a reconstruction could be: the images through the codec alone."""


@runtime_checkable
class ReconstructsFromCaptions(Protocol):
    """A method that describes an image in words and makes it again from them."""

    def reconstruct_from_captions(self, images: Images, seeds: Sequence[int]) -> tuple[list[str], list[Tensor]]:
        """The likeliest caption of each image, and an image in [-1, 1] made of it and its seed alone, in the method's own size."""


@runtime_checkable
class RefusesRows(Protocol):
    """A method that cannot use every row; a loader asks it first, and leaves out what it refuses as it does a damaged sample."""

    def check_rows(self, batch: Batch, scoring: bool) -> None:
        """Raise a ``UserError`` for a ``row`` that is too long, or lacks what a validation (``scoring``) or training needs.

        No network runs, and images may be on the ``meta`` device.
        """


@runtime_checkable
class TakesImages(Protocol):
    """A method, or a block of one, that an experiment's images can be tried on before any is read."""

    def try_images(self, inputs: Tensor, targets: Tensor) -> None:
        """Take a blank input image and a blank image to generate, ``[1, 3, H, W]`` each, as the first batch will.

        No number is looked at; images may be on the ``meta`` device. Whatever raises is a size that the first batch would refuse.
        """


@runtime_checkable
class RollsOut(Protocol):
    """A method that trains on its own samples."""

    def rollout_outputs(self) -> tuple[Outputs, Batch] | None:
        """The first sample of each row of the last rollout, and its batch; None before the first."""
