"""Texts that a method writes before it generates an image, or between two; and the capabilities to write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.outputs import Sampling


@dataclass(frozen=True)
class Thought:
    """Reasoning of a row, and what of it an image is generated from.

    Args:
        text: all that was written.
        request: the user's words that the image is generated from.
        marked: whether the marker that was asked for is in the text; where it is not, ``request`` is the user's own.
        ends: whether the text says that nothing is left to do.
        system: instructions before the request, where it was written under some and the image is generated under them too.
        reply: what stands behind the request as a turn of the model's own.
    """

    text: str
    request: str
    marked: bool = True
    ends: bool = False
    system: str = ""
    reply: str = ""


@runtime_checkable
class Thinks(Protocol):
    """A method that can reason about a request before it generates the image (capability; ``outputs`` has the others)."""

    def think(self, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        """A thought about each row, which depends on the row and its seed alone."""

    def generate(self, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Tensor]:
        """See ``outputs.Draws``; of a row whose words are a thought's ``request``."""


@runtime_checkable
class Reflects(Protocol):
    """A method that can say what an image lacks, and generate it again so."""

    def reflect(self, batch: Batch, seeds: Sequence[int]) -> list[Thought]:
        """What is to be changed in the one image of each row, so that it shows what the row's words ask for."""

    def generate(self, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Tensor]:
        """See ``outputs.Draws``; of a row with its image, whose words are a thought's ``request``."""
