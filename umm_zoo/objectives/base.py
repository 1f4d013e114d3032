"""Objective of training on latents: a network's loss, and latents out of the trained network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from umm_zoo.batch import Tokens
from umm_zoo.errors import UserError
from umm_zoo.objectives.reduction import mean_over_groups

#: A denoiser ``(noisy, time, condition)``, or a regression head ``(condition)``: each objective says which it calls.
Predictor = Callable[..., Tensor]

#: ``[B, C, h, w]``.
Shape = tuple[int, int, int, int]


class Objective(ABC):
    """A loss of a network, clean latents and a condition; and latents of a condition through the trained network.

    A subclass implements ``losses`` (one value per sample, so that a method can leave samples out) and ``sample``.

    Attributes:
        makes: names of the scalars that a call gives.
    """

    makes: ClassVar[tuple[str, ...]] = ("loss",)

    @property
    def num_noises(self) -> int:
        """Draws of noise, of the latents' shape, that ``sample_from`` makes a sample of."""
        return 0

    @abstractmethod
    def losses(self, denoiser: Predictor, latents: Tensor, condition: Tokens, generator: torch.Generator | None = None) -> Tensor:
        """The loss of every sample.

        Args:
            denoiser: the network.
            latents: ``[B, C, h, w]``, clean.
            condition: ``[B, N, E]``.
            generator: for the draws of time and noise.

        Returns:
            ``[R, B]``, R being the number of draws per sample.
        """

    @abstractmethod
    def sample(self, denoiser: Predictor, shape: Shape, condition: Tokens, generator: torch.Generator | None = None) -> Tensor:
        """Latents of the given shape from the condition alone."""

    def sample_from(self, denoiser: Predictor, noise: Tensor, condition: Tokens) -> Tensor:
        """Latents ``[B, C, h, w]`` of given noise ``[num_noises, B, C, h, w]``, so that each row may have draws of its own.

        Raises:
            UserError: this objective draws noise in another way.
        """
        raise UserError("objective", type(self).__name__, "FlowMatching, GaussianNoisePrediction or a regression")

    def __call__(
        self, denoiser: Predictor, latents: Tensor, condition: Tokens, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Scalars of one batch; ``loss`` is the mean over all samples and draws."""
        return {"loss": self.losses(denoiser, latents, condition, generator).mean()}

    def over_sizes(
        self, denoiser: Predictor, groups: Sequence[tuple[Tensor, Tokens]], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """As a call, over all samples of several groups, each of latents of one size and their condition."""
        return mean_over_groups([(len(latents), self(denoiser, latents, own, generator)) for latents, own in groups])


def shape_of(noise: Tensor) -> Shape:
    """Of latents, of draws of noise ``[num_noises, B, C, h, w]``."""
    batch, channels, height, width = noise.shape[1:]
    return batch, channels, height, width


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 where they are."""
    return x if x.dtype == torch.float64 else x.float()
