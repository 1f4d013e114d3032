"""Image decoder of a bridge: a large denoiser of latents under a condition of a stated width and scale."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from umm_zoo.batch import Grid, Group, Tokens
from umm_zoo.blocks.denoisers import Denoiser
from umm_zoo.objectives.schedules import ReleaseSchedule


class ImageDecoder(Denoiser):
    """A pretrained network that predicts what its release was trained for, from a noisy latent, the time and condition tokens.

    A flow predicts the velocity at times in [0, 1]; diffusion on discrete steps (``DiscreteDecoder``) the noise or v at integers.
    The ``schedule`` says which, and objectives of another kind refuse it. What a bridge must know about it stands in its
    attributes; how its library takes time, masks and dtypes stays inside. Subclasses wrap one network each in ``predict``; those of
    diffusers are ``DiffusersDecoder``.

    Attributes:
        model: the library's network.
        condition_dim: E, the width of the condition tokens.
        condition_rms: root mean square of the condition the network was trained with, per token; a bridge that ends in a norm of
            this scale starts where the network is at home.
        latent_channels: C, which must be the codec's.
        patch: cells of the latent per token along one side; h and w must be multiples of it.
        pixels_per_cell: the codec's factor, for networks that are told the size in pixels; whoever joins the two sets it.

    Shape:
        - noisy: ``[B, C, h, w]``
        - time: ``[B]`` in [0, 1], 0 data, 1 noise; whole numbers of steps where those are discrete
        - condition: ``[B, N, E]``, a mask where rows have padding
        - output: ``[B, C, h, w]``, velocity (noise minus data), or noise or v, in the dtype of ``noisy``

    Raises:
        ValueError: the latent or the condition has another shape than stated.
    """

    model: Any
    condition_dim: int
    condition_rms: float
    latent_channels: int
    patch: int = 1
    pixels_per_cell: int = 8

    @property
    def sample_size(self) -> int:
        """Side, in cells, of the latents that the network was made for."""
        return int(self.model.config.sample_size)

    @property
    def schedule(self) -> ReleaseSchedule | None:
        """What the network's own release is trained and sampled on; None where nothing is known."""
        return None

    @abstractmethod
    def predict(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The network itself, on tensors of its own dtype (time stays float32 or wider); see the class for shapes."""

    def forward(self, noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
        """Predict."""
        return self.predict(*self.checked(noisy, time, condition)).to(noisy.dtype)

    def checked(self, noisy: Tensor, time: Tensor, condition: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What ``predict`` takes; a ``ValueError`` where a shape is another."""
        self._check(noisy, time, condition)
        dtype: torch.dtype = self.model.dtype
        moment = time if time.dtype == torch.float64 else time.float()  # 1000 values of t do not fit into bfloat16
        return noisy.to(dtype), moment, condition.values.to(dtype), condition.mask

    def conditioned(self, groups: Sequence[Group], condition: Callable[[list[int], Tensor], Tokens]) -> list[tuple[Tensor, Tokens]]:
        """Latents of each group and their ``condition``, for an objective; stand-ins run through the network here, for nothing.

        Args:
            groups: of latents, as ``by_size`` gives them.
            condition: of the rows and latents of a group; those of a stand-in have no rows.
        """
        made = [(latents, condition(rows, latents)) for rows, latents in groups]
        kept = [own for own, (rows, _) in zip(made, groups, strict=True) if rows]
        for latents, own in made[len(kept) :]:  # stand-ins come last
            unused = 0 * self(latents, latents.new_zeros(1), own).sum()
            first = kept[0][1]
            kept[0] = (kept[0][0], replace(first, values=first.values + unused.to(first.values.dtype)))
        return kept

    def takes(self, grid: Grid) -> bool:
        """Whether the network takes latents of so many cells."""
        return not any(side % self.patch for side in grid)

    def try_latents(self, latents: Tensor, condition: Tokens | None = None) -> None:
        """Run once on blank latents ``[1, C, h, w]``, with two condition tokens if none are given, see ``outputs.TakesImages``."""
        condition = condition or Tokens(torch.zeros(1, 2, self.condition_dim, device=latents.device))
        self(latents, torch.ones(1, device=latents.device), condition)

    def _check(self, noisy: Tensor, time: Tensor, condition: Tokens) -> None:
        name, patch = type(self).__name__, self.patch
        if noisy.ndim != 4 or noisy.shape[1] != self.latent_channels or any(side % patch for side in noisy.shape[2:]):
            sides = f" with h and w multiples of {patch}" if patch > 1 else ""
            raise ValueError(f"{name}.noisy: found {list(noisy.shape)}, expected [B, {self.latent_channels}, h, w]{sides}")
        if time.shape != noisy.shape[:1]:
            raise ValueError(f"{name}.time: found {list(time.shape)}, expected [{len(noisy)}]")
        if condition.values.shape[::2] != (len(noisy), self.condition_dim):
            found = list(condition.values.shape)
            raise ValueError(f"{name}.condition: found {found}, expected [{len(noisy)}, N, {self.condition_dim}]")
