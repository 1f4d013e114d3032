"""Regression of a target at every token, straight from the condition."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.batch import Tokens
from umm_zoo.objectives.base import Objective, Predictor, Shape, at_least_float32, shape_of


class Regression(Objective):
    """Distance of ``head(condition)`` from the target, which a subclass defines.

    There is nothing random: one draw per sample, and ``sample`` is the prediction itself.
    """

    @abstractmethod
    def distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """``[B, C, h, w]`` each -> errors ``[B, ..., h, w]``, of which the mean is taken."""

    def losses(self, denoiser: Predictor, latents: Tensor, condition: Tokens, generator: torch.Generator | None = None) -> Tensor:
        """The distance of every sample, ``[1, B]``.

        Raises:
            ValueError: the head predicts another shape than the target's.
        """
        with torch.autocast(latents.device.type, enabled=False):
            predicted = denoiser(condition)
        if predicted.shape != latents.shape:
            raise ValueError(f"regression: found a prediction {list(predicted.shape)}, expected the target's {list(latents.shape)}")
        target = at_least_float32(latents)
        return self.distance(predicted.to(target.dtype), target).flatten(1).mean(dim=1)[None]

    @torch.no_grad()
    def sample(self, denoiser: Predictor, shape: Shape, condition: Tokens, generator: torch.Generator | None = None) -> Tensor:
        """The prediction; the shape is the head's own."""
        return denoiser(condition)

    def sample_from(self, denoiser: Predictor, noise: Tensor, condition: Tokens) -> Tensor:
        """The prediction."""
        return self.sample(denoiser, shape_of(noise), condition)


class MeanSquaredError(Regression):
    """Mean over channels and tokens of the squared difference: ROSS's regression to pixels and to VAE latents (section 3.2)."""

    def distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Squared difference, ``[B, C, h, w]``."""
        return (predicted - target).square()


class NegativeCosine(Regression):
    """Mean over tokens of ``1 - cos(prediction, target)``: ROSS's other distance.

    Which of the two the paper used with which teacher is not stated; cosine for teachers' features is our choice, because their
    scale carries nothing that a head needs to match.
    """

    def distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """One minus the cosine over channels, ``[B, h, w]``."""
        return 1 - F.cosine_similarity(predicted, target, dim=1)
