"""An objective with several draws of time and noise for each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from umm_zoo.batch import Tokens
from umm_zoo.errors import Count
from umm_zoo.objectives.base import Objective, Predictor, Shape
from umm_zoo.objectives.gaussian import repeated


class SeveralDraws(Objective):
    """Another objective whose loss of a sample is seen under ``num_draws`` draws, for one condition: MAR's batch multiplier.

    A condition costs much more than a small head, so further draws are nearly free. ``GaussianNoisePrediction`` has its own.

    Args:
        objective: of each draw.
        num_draws: 4 in MAR (arXiv 2406.11838, released code).
    """

    def __init__(self, objective: Objective, num_draws: Count = 4) -> None:
        self.objective, self.num_draws = objective, num_draws

    def losses(self, denoiser: Predictor, latents: Tensor, condition: Tokens, generator: torch.Generator | None = None) -> Tensor:
        """As the base class, ``num_draws`` times as many draws."""
        copies = latents.repeat(self.num_draws, *[1] * (latents.ndim - 1))
        found = self.objective.losses(denoiser, copies, repeated(condition, self.num_draws), generator)
        return found.unflatten(1, (self.num_draws, -1)).flatten(0, 1)

    def sample(self, denoiser: Predictor, shape: Shape, condition: Tokens, generator: torch.Generator | None = None) -> Tensor:
        """The other objective's."""
        return self.objective.sample(denoiser, shape, condition, generator)

    @property
    def num_noises(self) -> int:
        """The other objective's."""
        return self.objective.num_noises

    def sample_from(self, denoiser: Predictor, noise: Tensor, condition: Tokens) -> Tensor:
        """The other objective's."""
        return self.objective.sample_from(denoiser, noise, condition)
