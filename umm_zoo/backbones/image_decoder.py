"""Image decoder of a bridge: a large denoiser of latents under a condition of a stated width and scale."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from umm_zoo.batch import Grid, Tokens
from umm_zoo.blocks.denoisers import Denoiser
from umm_zoo.objectives.schedules import LibrarySchedule


class ImageDecoder(Denoiser):
    """A pretrained diffusion transformer that predicts velocity from a noisy latent, the time and condition tokens.

    What a bridge must know about it stands in three attributes; how its library takes time, masks and dtypes stays inside.
    Subclasses wrap one network each in ``predict``; those of diffusers are ``DiffusersDecoder``.

    Attributes:
        model: the library's network.
        condition_dim: E, the width of the condition tokens.
        condition_rms: root mean square of the condition the network was trained with, per token; a bridge that ends in a norm of
            this scale starts where the network is at home.
        latent_channels: C, which must be the codec's.
        patch: pixels of the latent per token along one side; h and w must be multiples of it.

    Shape:
        - noisy: ``[B, C, h, w]``
        - time: ``[B]`` in [0, 1], 0 data, 1 noise
        - condition: ``[B, N, E]``, a mask where rows have padding
        - output: ``[B, C, h, w]``, velocity (noise minus data), in the dtype of ``noisy``

    Raises:
        ValueError: the latent or the condition has another shape than stated.
    """

    model: Any
    condition_dim: int
    condition_rms: float
    latent_channels: int
    patch: int = 1

    @property
    def sample_size(self) -> int:
        """Side, in cells, of the latents that the network was made for."""
        return int(self.model.config.sample_size)

    @property
    def schedule(self) -> LibrarySchedule | None:
        """The times, and with them the solver, with which the network's own release samples; None where none is known."""
        return None

    @abstractmethod
    def predict(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The network itself, on tensors of its own dtype (time stays float32 or wider); see the class for shapes."""

    def forward(self, noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
        """Predict the velocity."""
        self._check(noisy, time, condition)
        dtype: torch.dtype = self.model.dtype
        moment = time if time.dtype == torch.float64 else time.float()  # 1000 values of t do not fit into bfloat16
        return self.predict(noisy.to(dtype), moment, condition.values.to(dtype), condition.mask).to(noisy.dtype)

    def takes(self, grid: Grid) -> bool:
        """Whether the network takes latents of so many cells."""
        return not any(side % self.patch for side in grid)

    def try_latents(self, latents: Tensor) -> None:
        """Run once on blank latents ``[1, C, h, w]``, with two condition tokens, see ``outputs.TakesImages``."""
        condition = torch.zeros(1, 2, self.condition_dim, device=latents.device)
        self(latents, torch.ones(1, device=latents.device), Tokens(condition))

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
