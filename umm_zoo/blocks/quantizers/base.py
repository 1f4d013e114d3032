"""What every quantizer has, and the one that quantizes nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from umm_zoo.backbones.precision import ExactBuffers
from umm_zoo.errors import Count, Weight

#: Bits of one code at most: what a language model still has a vocabulary for, and far below what integers hold exactly.
MOST_BITS = 16


@dataclass
class Quantized:
    """Codes of latents, the values that stand for them, and what training adds to the loss.

    Shape:
        - embeddings: ``[B, N, d]``, exactly the values of the codes; their gradient goes straight through to the latents
        - codes: ``[B, N, D]`` long
        - losses: ``[]`` by name, as they are; ``loss`` is their weighted sum. Empty in evaluation mode
    """

    embeddings: Tensor
    codes: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(ExactBuffers, ABC):
    """Map from the latent of each token to D codes, integers in [0, K), and from codes to values.

    Tokens come as ``[B, N, d]`` and not as maps of cells: what transformers make has no rows and columns.

    Shape:
        - latents: ``[B, N, d]``
        - output: ``Quantized``

    Attributes:
        dim: d.
        num_codes: K.
        codes_per_token: D.
        bits: of a token.
        keeps_length: whether values are near the latents themselves, and not near their directions alone.
    """

    dim: int
    num_codes: int
    codes_per_token: int
    bits: float
    keeps_length: bool = True
    idle: bool = False  #: rows that stand in for others are seen: nothing of them is remembered
    decayed = False  # no weight decay: a code is no weight, see ``NamedParts.mark_undecayed``

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """Numbers of codes of the first, the second … code of a token: K each, unless a subclass has places with fewer."""
        return (self.num_codes,) * self.codes_per_token

    @abstractmethod
    def forward(self, latents: Tensor) -> Quantized:
        """Codes, their values and, while training, losses."""

    @abstractmethod
    def values_of(self, codes: Tensor) -> Tensor:
        """Values ``[B, N, d]`` of codes ``[B, N, D]``, bit for bit those of ``forward``."""

    def after_step(self) -> None:
        """Take in what an optimiser step has seen; all ranks call this together, once a step, behind the backward pass."""

    def forget_step(self) -> None:
        """Drop what a step has seen that is skipped."""

    def example_inputs(self) -> tuple[Tensor]:
        """Latents for ``umm_zoo.testing.check_block``."""
        return (torch.randn(2, 5, self.dim),)


class NoQuantizer(Quantizer):
    """Values as they are, without codes: a control; and the noise of representation autoencoders.

    While training, ``values + s * n`` with n standard normal and s uniform on [0, noise], one s per image.

    Reference: Zheng et al., 2025, arXiv 2510.11690, section 3 (noise .8).

    Args:
        dim: d.
        noise: largest deviation of what is added.
    """

    def __init__(self, dim: Count, noise: Weight = 0.0) -> None:
        super().__init__()
        self.dim, self.noise = dim, noise
        self.num_codes, self.codes_per_token, self.bits = 0, 0, 32.0 * dim

    def forward(self, latents: Tensor) -> Quantized:
        """See the base class; D is 0."""
        codes = torch.empty(*latents.shape[:-1], 0, dtype=torch.long, device=latents.device)
        if self.training and self.noise:
            scale = self.noise * torch.rand(len(latents), *[1] * (latents.ndim - 1), device=latents.device, dtype=latents.dtype)
            latents = latents + scale * torch.randn_like(latents)
        return Quantized(latents, codes)

    def values_of(self, codes: Tensor) -> Tensor:
        """There are none.

        Raises:
            ValueError: always.
        """
        raise ValueError("NoQuantizer.values_of: found codes, expected a quantizer that has some")


def straight_through(latents: Tensor, values: Tensor) -> Tensor:
    """Exactly ``values``, with the gradient of ``latents``; the usual ``z + (q - z)`` is off by rounding."""
    return values.detach() + (latents - latents.detach())


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats, ``[]``; its gradient is finite where a probability has become zero."""
    return -(probabilities * probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()).sum()
