"""Settings of Dual-GRPO: images of each thought, what they are compared with, and the weights of the two losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from umm_zoo.errors import Count, Weight


@dataclass(frozen=True)
class ThoughtImages:
    """Images of a thought, in training.

    Args:
        each: K, of each thought (not published; our choice).
        compared: with which others an image's advantage compares it: those of its ``thought``, so that the decoder is not paid for
            what a better thought has brought; or all J K of its ``prompt``.
        guidance: scale in sampling and training, the unconditional branch detached; None is the renderer's own.

    Raises:
        ValueError: an image with nothing to be compared with.
    """

    each: Count = 4
    compared: Literal["thought", "prompt"] = "thought"
    guidance: Weight | None = None

    def __post_init__(self) -> None:
        if self.compared not in ("thought", "prompt"):
            raise ValueError(f"compared: found '{self.compared}', expected thought or prompt")


class Balance(ABC):
    """Weights of the two losses by the number of updates made; one whose weight is 0 is not computed."""

    @abstractmethod
    def __call__(self, step: int) -> tuple[float, float]:
        """Of thoughts and of images."""

    @abstractmethod
    def ever(self) -> tuple[bool, bool]:
        """Whether thoughts and images have a weight at any step."""


class ConstantBalance(Balance):
    """The same weights throughout.

    Args:
        text, image: of thoughts and of images.

    Raises:
        ValueError: both are 0.
    """

    def __init__(self, text: Weight = 1.0, image: Weight = 1.0) -> None:
        if not text and not image:
            raise ValueError("ConstantBalance: found weights 0 and 0, expected one above 0")
        self.text, self.image = text, image

    def __call__(self, step: int) -> tuple[float, float]:
        """These."""
        return self.text, self.image

    def ever(self) -> tuple[bool, bool]:
        """See the base class."""
        return self.text > 0, self.image > 0


class LinearBalance(Balance):
    """Weights that go in a straight line from ``first`` to ``last`` in ``steps`` updates, and stay there.

    The paper schedules its two rewards; how is not published.

    Args:
        first, last: ``(text, image)``.
        steps: between them.

    Raises:
        ValueError: both are 0 at one end.
    """

    def __init__(self, first: tuple[Weight, Weight], last: tuple[Weight, Weight], steps: Count) -> None:
        if not any(first) or not any(last):
            raise ValueError(f"LinearBalance: found weights {tuple(first)} and {tuple(last)}, expected one above 0 at each end")
        self.first, self.last, self.steps = tuple(first), tuple(last), steps

    def __call__(self, step: int) -> tuple[float, float]:
        """On the line."""
        share = min(1.0, step / self.steps)
        text, image = ((1 - share) * one + share * other for one, other in zip(self.first, self.last, strict=True))
        return text, image

    def ever(self) -> tuple[bool, bool]:
        """See the base class."""
        text, image = (one > 0 or other > 0 for one, other in zip(self.first, self.last, strict=True))
        return text, image
