"""Connectors: the language model's states at the queries to the condition of an image decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from umm_zoo.batch import Grid, Tokens
from umm_zoo.blocks.positions import CroppedTable2d, PositionEmbedding
from umm_zoo.errors import Count


class Connector(nn.Module, ABC):
    """Map from the states at the queries to condition tokens.

    Attributes:
        in_dim: language-model width D.
        out_dim: condition width E.

    Shape:
        ``[B, N, D]`` and the queries' grid -> ``[B, N, E]``.
    """

    in_dim: int
    out_dim: int

    @abstractmethod
    def forward(self, states: Tokens, grid: Grid) -> Tokens:
        """Map."""

    def match_rms(self, rms: float) -> None:
        """Start from the root mean square that the decoder's condition had in its own training, where a norm ends the connector."""
        if isinstance(norm := getattr(self, "norm", None), nn.RMSNorm):
            nn.init.constant_(norm.weight, rms)

    def example_inputs(self) -> tuple[Tokens, Grid]:
        """States of a grid that is not square, for ``umm_zoo.testing.check_block``."""
        return Tokens(torch.randn(2, 12, self.in_dim)), Grid(3, 4)


class PositionMLP(Connector):
    """A position added to each state, then a gated MLP: ``down(silu(gate(z + P)) * up(z + P))``, then an RMS norm.

    WeMMU's whole connector; the trainable pathway before it does the rest. The position is needed because a decoder such as Sana
    has none of its own, and cross-attention does not see where a condition token stands. The paper gives the form and 2048 to
    2304; hidden width, activation, biases and the norm, whose scale starts at the decoder's ``condition_rms``, are our choice, the
    last two as in the connectors of its parents.

    Reference: Yang et al., "WeMMU" (arXiv 2512.02536).

    Args:
        in_dim: 2048 for Qwen2.5-VL-3B.
        out_dim: 2304 for Sana.
        hidden_dim: None is ``out_dim``.
        positions: None is a learned table of 64 x 64 zeros of which the centre is used.

    Raises:
        ValueError: ``positions`` are of another width.
    """

    def __init__(
        self, in_dim: Count, out_dim: Count, hidden_dim: Count | None = None, positions: PositionEmbedding | None = None
    ) -> None:
        super().__init__()
        hidden_dim = hidden_dim or out_dim
        self.in_dim, self.out_dim = in_dim, out_dim
        self.positions = positions if positions is not None else CroppedTable2d(in_dim)
        if self.positions.width != in_dim:
            raise ValueError(f"PositionMLP.positions: found a width of {self.positions.width}, expected in_dim, {in_dim}")
        self.gate = nn.Linear(in_dim, hidden_dim)
        self.up = nn.Linear(in_dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, out_dim)
        self.norm = nn.RMSNorm(out_dim, eps=1e-6)

    def forward(self, states: Tokens, grid: Grid) -> Tokens:
        """Position, gated MLP, norm."""
        x = self.positions(states.values, grid)  # [B, N, D]
        made = self.down(F.silu(self.gate(x)) * self.up(x))
        return Tokens(self.norm(made.to(self.norm.weight.dtype)), states.mask)  # two dtypes would be slow, and round


class MLPConnector(Connector):
    """Linear, GELU, Linear on every token, without position.

    UAE: 2048 to 8192 to 4096 with biases and no norm (50.3 M parameters), for Stable Diffusion 3.5 in place of its text encoders;
    the release's ``projector.0`` and ``projector.2`` are ``wide`` and ``out`` here, and its GELU is the exact one.

    Reference: Yan et al., "Can Understanding and Generation Truly Benefit Together -- or Just Coexist?" (arXiv 2509.09666).

    Args:
        in_dim, out_dim: language-model and condition width.
        hidden_dim: None is twice ``out_dim``, as in the release.
    """

    def __init__(self, in_dim: Count, out_dim: Count, hidden_dim: Count | None = None) -> None:
        super().__init__()
        hidden_dim = hidden_dim or 2 * out_dim
        self.in_dim, self.out_dim = in_dim, out_dim
        self.wide, self.out = nn.Linear(in_dim, hidden_dim), nn.Linear(hidden_dim, out_dim)

    def forward(self, states: Tokens, grid: Grid) -> Tokens:
        """Apply to every token alone."""
        return Tokens(self.out(F.gelu(self.wide(states.values))), states.mask)
