"""Rewards for generated images: ``(R candidates, batch) -> [R]``, higher is better."""

from umm_zoo.rewards.base import Reward, group_size
from umm_zoo.rewards.combining import ShuffledReward, WeightedReward
from umm_zoo.rewards.reconstruction import ReconstructionReward

__all__ = ["ReconstructionReward", "Reward", "ShuffledReward", "WeightedReward", "group_size"]
