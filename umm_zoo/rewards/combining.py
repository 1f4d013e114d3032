"""Rewards made of rewards: a weighted sum, and a control that must teach nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.rewards.base import Reward, group_size


class WeightedReward(Reward):
    """Weighted sum of rewards: ``sum_k weight_k reward_k``.

    Args:
        rewards: by name.
        weights: by the same names; None is 1 each.

    Raises:
        ValueError: no reward, or names that differ.
    """

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float] | None = None) -> None:
        super().__init__()
        weights = dict.fromkeys(rewards, 1.0) if weights is None else dict(weights)
        if not rewards or rewards.keys() != weights.keys():
            raise ValueError(f"WeightedReward: weights are of {sorted(weights)}, expected those of {sorted(rewards)}")
        self.rewards, self.weights = nn.ModuleDict(rewards), weights

    def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
        """The sum."""
        terms = [self.weights[name] * reward(candidates, batch) for name, reward in self.rewards.items()]
        return torch.stack(terms).sum(dim=0)


class ShuffledReward(Reward):
    """Reward of every candidate for another row's source: the control in which nothing about the image can be learned.

    What grows under it (the length of captions, say) does so without any help of the reward. Row i is compared with row i + 1.

    Args:
        reward: the one under test.

    Raises:
        UserError: a batch of one row, which has no other.
    """

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.reward = reward

    def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
        """The reward of candidates moved on by one row, moved back."""
        if len(batch) < 2:
            raise UserError("data.batch_size", "one row per rank", "two or more, for ShuffledReward compares with another row")
        group = group_size(candidates, batch)
        return self.reward(candidates[-group:] + candidates[:-group], batch).roll(-group, dims=0)
