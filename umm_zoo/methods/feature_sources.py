"""Sources of the features that a decoder is shown beside a prompt: forged ones, and controls in their place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.errors import UserError


class HasFeatures(Protocol):
    """A method that forges features, and knows the true ones."""

    def forged(self, batch: Batch, seeds: Sequence[int]) -> Tensor:
        """Features ``[B, N, D]`` of each row's prompt, which depend on the row and its seed alone."""

    def true_features(self, batch: Batch) -> Tensor:
        """Features ``[B, N, D]`` of the images that the rows ask for."""

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Normal noise ``[B, N, D]``, a row for each seed."""


class FeatureSource(ABC):
    """Choice of what is injected while an image is generated."""

    @abstractmethod
    def __call__(self, method: HasFeatures, batch: Batch, seeds: Sequence[int]) -> Tensor:
        """Features ``[B, N, D]`` for the rows."""


class Forged(FeatureSource):
    """What is forged from each row's own prompt: Forge-and-Quench."""

    def __call__(self, method: HasFeatures, batch: Batch, seeds: Sequence[int]) -> Tensor:
        """As the method forges them."""
        return method.forged(batch, seeds)


class OthersForged(FeatureSource):
    """What is forged from another prompt of the batch: row i gets that of row i + 1. As good a feature, and of no use. A control.

    Raises:
        UserError: a batch of one row, which has no other.
    """

    def __call__(self, method: HasFeatures, batch: Batch, seeds: Sequence[int]) -> Tensor:
        """Moved on by one row."""
        if len(batch) < 2:
            raise UserError("data.val_batch_size", "one row", "two or more, for OthersForged takes what is forged for another")
        return method.forged(batch, seeds).roll(-1, dims=0)


class NoiseFeatures(FeatureSource):
    """Normal noise of the size of features, tokens that say nothing. A control."""

    def __call__(self, method: HasFeatures, batch: Batch, seeds: Sequence[int]) -> Tensor:
        """That which the forge would have started from."""
        return method.noise(seeds)


class TrueFeatures(FeatureSource):
    """Features of the image that the row asks for: what a perfect forge would inject, and more than a prompt says. A ceiling.

    Raises:
        UserError: a row has no such image.
    """

    def __call__(self, method: HasFeatures, batch: Batch, seeds: Sequence[int]) -> Tensor:
        """Of the targets."""
        for row, known in enumerate(batch.has_target):
            if not known:
                raise UserError("", "no image to generate", "rows with a target, for TrueFeatures looks at it", row=row)
        return method.true_features(batch)
