"""Reduction of a batch's losses to one number when some of its rows hold no image."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Reduction(ABC):
    """From the losses ``[R, B]`` and ``has_image [B]`` to a scalar.

    Attributes:
        counts_rows_without_image: whether such rows take part, with a zero condition and a flat image; a method then
            appends them to the batch.
    """

    counts_rows_without_image: bool

    def count(self, has_image: Tensor) -> Tensor:
        """Number of samples that the loss is a mean over, ``[]``."""
        return has_image.new_tensor(len(has_image), dtype=torch.long) if self.counts_rows_without_image else has_image.sum()

    @abstractmethod
    def __call__(self, losses: Tensor, has_image: Tensor, num_images: Tensor | None = None) -> Tensor:
        """The loss of the batch, ``[]``; ``num_images`` are those of the whole optimiser step where that is more."""


class MeanOverImages(Reduction):
    """Mean over the draws of the rows that hold an image, 0 without any.

    What ROSS's mask evidently intends, though its release does something else (``ReleasedReduction``); the default here.
    """

    counts_rows_without_image = False

    def __call__(self, losses: Tensor, has_image: Tensor, num_images: Tensor | None = None) -> Tensor:
        """``sum(m * loss) / sum(m)``."""
        weights = has_image.to(losses.dtype).expand_as(losses)  # [R, B]
        # masked_fill before the product: 0 times an infinite loss would not be 0
        kept = losses.masked_fill(weights == 0, 0.0)
        return kept.sum() / weights.sum().clamp(min=1)


class ReleasedReduction(Reduction):
    """That of ROSS's release: the mean over all rows first, then a factor of almost 1, or 0 when no row holds an image.

    Rows without an image therefore add the loss of denoising a flat grey image from a zero condition. For parity with the
    release only.
    """

    counts_rows_without_image = True

    def __call__(self, losses: Tensor, has_image: Tensor, num_images: Tensor | None = None) -> Tensor:
        """``mean(loss) * sum(m) / (sum(m) + 1e-6)``."""
        count = len(losses) * (has_image.sum() if num_images is None else num_images).to(losses.dtype)  # R * number of images
        return losses.mean() * (count / (count + 1e-6))
