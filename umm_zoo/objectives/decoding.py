"""Objective that an image decoder is trained with, and sampled under guidance."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from umm_zoo.batch import Tokens
from umm_zoo.objectives.base import Objective, Predictor, Shape
from umm_zoo.objectives.guidance import Branch, GuidedDenoiser
from umm_zoo.objectives.schedules import ReleaseSchedule
from umm_zoo.objectives.times import exact


class DecoderObjective(Objective):
    """Objective of an image decoder: a flow (``FlowMatching``), or diffusion on discrete steps (``DiscreteDiffusion``).

    What a network predicts belongs to its objective and not to the network's wrapper, as in the library: pipelines hold a network
    that knows no schedule, and a scheduler that says what the network predicts. A network of noise brought to a velocity of
    straight paths inside its wrapper would be trained under other weights of its steps than its release, and its error at the
    noisiest step would be multiplied (by 14 in Stable Diffusion 1.5).

    Attributes:
        num_steps: of sampling.
    """

    num_steps: int

    @abstractmethod
    def match(self, own: ReleaseSchedule | None) -> None:
        """Train and sample as the decoder's release does where the objective does not say another way.

        Args:
            own: ``ImageDecoder.schedule``; None changes nothing.

        Raises:
            UserError: the release is trained with another kind of objective, or sampled in a way that is not known here.
        """

    @abstractmethod
    def sample(
        self,
        denoiser: Predictor,
        shape: Shape,
        condition: Tokens | Sequence[Branch],
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Latents from noise.

        Args:
            denoiser: the network.
            shape: ``[B, C, h, w]``.
            condition: one condition, or branches of guidance whose predictions are added with their weights
                (``guidance.guide``, ``guidance.guide_edit``, or any other list).
            generator: for the noise.
            noise: to start from, in place of a draw; of unit deviation.
            num_steps: in place of the objective's own.

        Raises:
            ValueError: the weights of the branches do not add up to one.
        """

    @staticmethod
    def begin(
        denoiser: Predictor,
        shape: Shape,
        condition: Tokens | Sequence[Branch],
        generator: torch.Generator | None,
        noise: Tensor | None,
    ) -> tuple[Predictor, Tokens, Tensor]:
        """Network, condition and noise that ``sample`` starts with: branches become one network under one condition."""
        if not isinstance(condition, Tokens):
            denoiser = GuidedDenoiser(denoiser, condition)
            condition = denoiser.condition
        device = condition.values.device
        x = torch.randn(shape, generator=generator, device=device, dtype=exact()) if noise is None else noise.to(device)
        return denoiser, condition, x
