"""Base class of rewards: how much a generated image is worth, given the row that it was generated for."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from umm_zoo.batch import Batch, Images


class Reward(nn.Module, ABC):
    """Score of candidate images; higher is better. Used without gradient, and it has no parameters to train.

    The batch has B rows, the candidates are R = B * G images, the G of one row next to each other: what concerns the row alone
    (its image's features, say) need be computed once. A subclass of one's own is used by its dotted path; ``umm_zoo.testing``'s
    ``check_reward`` puts it through the contract.

    Shape:
        - candidates: R of ``[3, H, W]`` in [-1, 1], of any sizes; ``forward`` takes a stack apart
        - output: ``[R]`` float32
    """

    @abstractmethod
    def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
        """``[R]``; see the class."""

    @torch.no_grad()
    def forward(self, candidates: Images, batch: Batch) -> Tensor:
        """The rewards, detached.

        Raises:
            ValueError: the candidates are not a whole number of images per row, or another number of rewards comes back.
        """
        if not len(batch) or len(candidates) % len(batch):
            raise ValueError(f"{type(self).__name__}: found {len(candidates)} candidates for {len(batch)} rows")
        rewards = self.score(list(candidates), batch).float()
        if rewards.shape != (len(candidates),):
            raise ValueError(f"{type(self).__name__}: expected rewards of shape [{len(candidates)}], found {list(rewards.shape)}")
        return rewards


def group_size(candidates: Images, batch: Batch) -> int:
    """G, the number of candidates per row."""
    return len(candidates) // len(batch)
