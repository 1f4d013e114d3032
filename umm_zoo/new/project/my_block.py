"""A block: a class of a few arguments whose base class states the shapes."""

import torch
from torch import Tensor, nn

from umm_zoo.blocks.denoisers import RegressionHead


class GatedHead(RegressionHead):
    """Gated linear layer from hidden states to targets.

    Shape:
        ``[..., D] -> [..., C]``

    Args:
        condition_dim: width D of the states.
        channels: numbers C to regress for each.
    """

    def __init__(self, condition_dim: int, channels: int) -> None:
        super().__init__()
        self.condition_dim, self.channels = condition_dim, channels
        self.value, self.gate = nn.Linear(condition_dim, channels), nn.Linear(condition_dim, channels)

    def regress(self, states: Tensor) -> Tensor:
        """The targets of each state."""
        return self.value(states) * torch.sigmoid(self.gate(states))
