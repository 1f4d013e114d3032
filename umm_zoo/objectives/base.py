"""What every training objective on latents offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from umm_zoo.batch import Tokens

#: A denoiser ``(noisy, time, condition)``, or a regression head ``(condition)``: each objective says which it calls.
Predictor = Callable[..., Tensor]


class Objective(ABC):
    """Turns a network, clean latents and a condition into a loss, and the trained network back into latents.

    A subclass implements ``losses`` (one value per sample, so that a method can leave samples out) and ``sample``.

    Attributes:
        makes: names of the scalars that a call gives.
    """

    makes: ClassVar[tuple[str, ...]] = ("loss",)

    @abstractmethod
    def losses(
        self,
        denoiser: Predictor,
        latents: Tensor,
        condition: Tokens,
        generator: torch.Generator | None = None,
        cells: Tensor | None = None,
    ) -> Tensor:
        """The loss of every sample.

        Args:
            denoiser: the network.
            latents: ``[B, C, h, w]``, clean.
            condition: ``[B, N, E]``.
            generator: for the draws of time and noise.
            cells: ``[B, h, w]`` bool, True where a cell counts; None means that all do.

        Returns:
            ``[R, B]``, R being the number of draws per sample.
        """

    @abstractmethod
    def sample(
        self,
        denoiser: Predictor,
        shape: tuple[int, int, int, int],
        condition: Tokens,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Latents of the given shape ``[B, C, h, w]`` from the condition alone."""

    def __call__(
        self,
        denoiser: Predictor,
        latents: Tensor,
        condition: Tokens,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Scalars of one batch; ``loss`` is the mean over all samples and draws."""
        return {"loss": self.losses(denoiser, latents, condition, generator).mean()}


def mean_over_cells(errors: Tensor, cells: Tensor | None) -> Tensor:
    """Mean of ``[B, ..., h, w]`` errors over everything but the batch, on the cells that count only.

    A sample without any cell that counts gets 0.
    """
    if cells is None:
        return errors.flatten(1).mean(dim=1)  # [B]
    if errors.ndim > 3:
        errors = errors.flatten(1, -3).mean(dim=1)  # [B, h, w]
    weights = cells.to(errors.dtype)
    return (errors * weights).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1).clamp(min=1)
