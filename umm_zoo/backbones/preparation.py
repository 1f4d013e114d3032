"""What a method has prepared for a batch ahead of its step, by the processes that load data: rows as tokens, images for a tower.

A method declares it (``Prepares``), a loader runs it on each batch that it has made, and hands over what came of it in the process
that trains. Whatever is not prepared there, the step does itself: a batch made from Python, a prompt that the step changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from umm_zoo.backbones.processed_images import ProcessedImages
from umm_zoo.batch import Batch


@dataclass
class Prepared:
    """What was prepared of a batch.

    Args:
        rows: by what was requested.
        images: those of each row as an image processor makes them; None where the step does that on its device.
    """

    rows: dict[Any, Any] = field(default_factory=dict)
    images: ProcessedImages | None = None


class Preparation(Protocol):
    """Preparation of batches: pickled to a loader's workers, so without weights, and small."""

    def __call__(self, outline: Batch, images: Sequence[NDArray[np.uint8]]) -> Prepared:
        """What a worker prepares of a batch, whose images are of their size without content, and ``[H, W, 3]`` in bytes."""

    def take(self, prepared: Prepared) -> None:
        """Keep it for the steps to come, in the process that trains."""


@runtime_checkable
class Prepares(Protocol):
    """A method of whose batches something can be prepared."""

    def preparation(self, scoring: bool) -> Preparation | None:
        """The preparation of batches of a training, or a validation (``scoring``); None where there is nothing to do."""


class Asked(NamedTuple):
    """Rows that a step will ask for: whole conversations, or prompts ``for_generation`` with an ``opening`` of the answer."""

    batch: Batch
    for_generation: bool = False
    opening: str = ""


@dataclass
class WholeRows:
    """What a method asks for that learns from whole conversations, and in a validation perhaps answers them."""

    answers: bool

    def __call__(self, batch: Batch) -> Iterable[Asked]:
        """All rows as they are, and their prompts."""
        return [Asked(batch), *([Asked(batch, True)] if self.answers else [])]
