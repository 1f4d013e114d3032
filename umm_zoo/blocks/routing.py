"""Routing of tokens to experts by what they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from umm_zoo.backbones.devices import send


@dataclass(frozen=True)
class Routing:
    """Places of the tokens of each expert.

    Args:
        places: for each expert ``[T_e]``, numbers in ``[B * L]``.
        shape: B and L.
    """

    places: tuple[Tensor, ...]
    shape: tuple[int, int]

    @classmethod
    def of(cls, route: Tensor, experts: int, device: torch.device) -> Routing:
        """That of numbers of experts ``[B, L]``, best on the CPU; with one expert all real tokens are its own."""
        own = route.clamp(max=experts - 1).flatten()
        places = (send((own == expert).nonzero()[:, 0], device) for expert in range(experts))
        return cls(tuple(places), (route.shape[0], route.shape[1]))

    def split(self, tokens: Tensor) -> list[Tensor]:
        """Tokens ``[B, L, ...]`` by expert, ``[T_e, ...]``."""
        flat = tokens.flatten(0, 1)
        return [flat if self._is_all(own) else flat.index_select(0, own) for own in self.places]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse, ``[B, L, ...]``, with zeros on padding."""
        for part, own in zip(parts, self.places, strict=True):
            if self._is_all(own):
                return part.unflatten(0, self.shape)
        whole = parts[0].new_zeros(self.shape[0] * self.shape[1], *parts[0].shape[1:])
        return whole.index_copy(0, torch.cat(self.places), torch.cat(list(parts))).unflatten(0, self.shape)

    def _is_all(self, own: Tensor) -> bool:
        return len(self.places) == 1 and len(own) == self.shape[0] * self.shape[1]
