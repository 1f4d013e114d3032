"""Reduction of losses: of a batch of which some rows hold no image, and of groups of samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def mean_over_groups(groups: Sequence[tuple[int, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Means over all samples of several groups, from the number of each and the means over them, by name."""
    if len(groups) == 1:
        return dict(groups[0][1])
    total = sum(count for count, _ in groups)
    return {name: torch.stack([count / total * means[name] for count, means in groups]).sum() for name in groups[0][1]}


class Reduction(ABC):
    """From the losses ``[R, B]`` and ``has_image [B]`` to a scalar.

    Attributes:
        counts_rows_without_image: whether such rows take part, with a zero condition and a flat image; a method then
            appends them to the batch.
    """

    counts_rows_without_image: bool

    def count(self, has_image: Tensor) -> Tensor:
        """Number of samples that the loss is a mean over, ``[]``."""
        return has_image.new_full((), len(has_image), dtype=torch.long) if self.counts_rows_without_image else has_image.sum()

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
