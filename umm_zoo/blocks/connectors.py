"""Connectors: the language model's states at the queries to the condition of an image decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.batch import Grid, Tokens
from umm_zoo.blocks.positions import CroppedTable2d, PositionEmbedding


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
        self, in_dim: int, out_dim: int, hidden_dim: int | None = None, positions: PositionEmbedding | None = None
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
        self.norm: nn.Module = nn.RMSNorm(out_dim, eps=1e-6)

    def forward(self, states: Tokens, grid: Grid) -> Tokens:
        """Position, gated MLP, norm."""
        x = self.positions(states.values, grid)  # [B, N, D]
        return Tokens(self.norm(self.down(F.silu(self.gate(x)) * self.up(x))), states.mask)


class MLPConnector(Connector):
    """Linear, GELU, Linear on every token, without position.

    UAE: 2048 to 8192 to 4096 with biases and no norm (50.3 M parameters), for Stable Diffusion 3.5 in place of its text encoders;
    the release's ``projector.0`` and ``projector.2`` are ``wide`` and ``out`` here, and its GELU is the exact one.

    Reference: Yan et al., "Can Understanding and Generation Truly Benefit Together -- or Just Coexist?" (arXiv 2509.09666).

    Args:
        in_dim, out_dim: language-model and condition width.
        hidden_dim: None is twice ``out_dim``, as in the release.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        hidden_dim = hidden_dim or 2 * out_dim
        self.in_dim, self.out_dim = in_dim, out_dim
        self.wide, self.out = nn.Linear(in_dim, hidden_dim), nn.Linear(hidden_dim, out_dim)

    def forward(self, states: Tokens, grid: Grid) -> Tokens:
        """Apply to every token alone."""
        return Tokens(self.out(F.gelu(self.wide(states.values))), states.mask)


class TransformerConnector(Connector):
    """A bidirectional encoder over the query states, then a projection to the condition ("Enc-Proj").

    MetaQuery's (the defaults): 24 pre-norm layers at the language model's width with a gated feed-forward of four times it, RMS
    norms also on queries and keys, rotary positions along the sequence; then Linear, GELU, Linear, RMS norm. OpenUni's: 6 layers of
    width 1536, feed-forward 8960, 24 heads, then one Linear (``width: 1536, depth: 6, heads: 24, hidden_dim: 8960,
    projection_layers: 1, normalised: false``).

    Reference: Pan et al., "Transfer between Modalities with MetaQueries" (arXiv 2504.06256); Wu et al., "OpenUni" (arXiv
    2505.23661).

    Args:
        in_dim, out_dim: language-model and condition width.
        depth, heads: of the encoder.
        width: of the encoder; None is ``in_dim``, otherwise a Linear comes first.
        hidden_dim: of the feed-forward; None is four times the encoder's width.
        projection_layers: 2 is Linear, GELU, Linear; 1 a single Linear.
        normalised: end with an RMS norm at the decoder's ``condition_rms``.

    Raises:
        ValueError: the heads do not divide the width into even sizes, or ``projection_layers`` is neither 1 nor 2.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        depth: int = 24,
        heads: int = 16,
        width: int | None = None,
        hidden_dim: int | None = None,
        projection_layers: int = 2,
        normalised: bool = True,
    ) -> None:
        super().__init__()
        if projection_layers not in (1, 2):
            raise ValueError(f"TransformerConnector.projection_layers: found {projection_layers}, expected 1 or 2")
        self.in_dim, self.out_dim = in_dim, out_dim
        inner = width or in_dim
        self.enter = nn.Identity() if inner == in_dim else nn.Linear(in_dim, inner)
        self.layers = nn.ModuleList(EncoderLayer(inner, heads, hidden_dim or 4 * inner) for _ in range(depth))
        self.leave = nn.RMSNorm(inner, eps=1e-6)
        wide = [nn.Linear(inner, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim)]
        self.projection = nn.Sequential(*wide) if projection_layers == 2 else nn.Linear(inner, out_dim)
        self.norm: nn.Module = nn.RMSNorm(out_dim, eps=1e-6) if normalised else nn.Identity()

    def forward(self, states: Tokens, grid: Grid) -> Tokens:
        """Encode, project, normalise."""
        x = self.enter(states.values)
        for layer in self.layers:
            x = layer(x, states.mask)
        return Tokens(self.norm(self.projection(self.leave(x))), states.mask)


class EncoderLayer(nn.Module):
    """A pre-norm layer: attention over all tokens with rotary positions and normalised queries and keys, gated feed-forward.

    Shape:
        ``[B, N, width]`` and a mask ``[B, N]`` or None -> ``[B, N, width]``.

    Raises:
        ValueError: the heads do not divide the width into even sizes.
    """

    def __init__(self, width: int, heads: int, hidden_dim: int) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width: found {width}, expected a multiple of 2 x heads ({heads}) for rotary positions")
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query_norm, self.key_norm = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden_dim, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention, then feed-forward."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, size]
        q, k = _rotate(self.query_norm(q)), _rotate(self.key_norm(k))
        attended = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        inner = self.norm2(x)
        return x + self.down(F.silu(self.gate(inner)) * self.up(inner))


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions along the sequence, ``[B, heads, N, size]``."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** -(torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies  # [N, size / 2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
