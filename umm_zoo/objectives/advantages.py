"""Advantages: how good samples are beside the others of their group, the weights of a policy gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

from umm_zoo.errors import Natural, Positive, Weight


class Advantage(ABC):
    """From the rewards of B groups of G samples to their advantages.

    A reward that is not finite has advantage 0 and counts in no mean. All rewards of a group being equal, its advantages are 0.

    Shape:
        ``[B, G]`` -> ``[B, G]``, no gradient.
    """

    @abstractmethod
    def __call__(self, rewards: Tensor) -> Tensor:
        """Advantages of a batch of groups."""


def centred(rewards: Tensor) -> Tensor:
    """Rewards ``[B, G]`` without their group's mean; 0 where one is not finite, and in a group whose rewards are all equal."""
    finite = rewards.isfinite()
    values = rewards.float().where(finite, 0.0)
    count = finite.sum(dim=1, keepdim=True).clamp(min=1)
    # of numbers that are all the same the mean may be off by a rounding, which dividing by no deviation would blow up
    highest = values.masked_fill(~finite, -torch.inf).amax(1, keepdim=True)
    lowest = values.masked_fill(~finite, torch.inf).amin(1, keepdim=True)
    return (values - values.sum(dim=1, keepdim=True) / count).where(finite & (highest > lowest), 0.0)


class GroupStandardised(Advantage):
    """``(R - mean) / (std + delta)`` within each group, GRPO's (Shao et al., 2024, arXiv 2402.03300, section 4.1).

    Args:
        delta: added to the deviation; 1e-4 in public implementations, the papers leave it open.
        correction: 1 divides the squares by G - 1, as public implementations do, 0 by G.
    """

    def __init__(self, delta: Weight = 1e-4, correction: Natural = 1) -> None:
        self.delta, self.correction = delta, correction

    @torch.no_grad()
    def __call__(self, rewards: Tensor) -> Tensor:
        """Divide by each group's own deviation."""
        gains = centred(rewards)
        count = (rewards.isfinite().sum(dim=1, keepdim=True) - self.correction).clamp(min=1)
        deviation = (gains.square().sum(dim=1, keepdim=True) / count).sqrt() + self.delta
        return gains / deviation.where(deviation > 0, 1.0)  # 0/0 of a group without a spread is 0


class BatchStandardised(Advantage):
    """The group's mean is taken off, the deviation of all rewards of the batch (of all ranks) divides, then a clamp.

    Flow-GRPO's released configurations (Liu et al., 2025, arXiv 2505.05470): the population deviation of the rewards themselves,
    not of the centred ones.

    Args:
        delta: added to the deviation.
        bound: largest magnitude.
    """

    def __init__(self, delta: Weight = 1e-4, bound: Positive = 5.0) -> None:
        self.delta, self.bound = delta, bound

    @torch.no_grad()
    def __call__(self, rewards: Tensor) -> Tensor:
        """Divide by the deviation of the whole batch."""
        values = rewards.double()[rewards.isfinite()]
        # two passes: a spread of a hundredth about .9 would drown in the difference of two squares
        count, total = _over_ranks(torch.stack([values.new_tensor(float(len(values))), values.sum()]))
        mean = total / count.clamp(min=1)
        (squares,) = _over_ranks((values - mean).square().sum()[None])
        deviation = (squares / count.clamp(min=1)).sqrt()
        return (centred(rewards) / (deviation.float() + self.delta)).clamp(-self.bound, self.bound)


def _over_ranks(sums: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    return sums
