"""Fusions: tokens of an encoder that understands and latents of a codec, of the same places, as tokens of the language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from umm_zoo.batch import Grid
from umm_zoo.blocks.bottlenecks import Projection
from umm_zoo.blocks.positions import PositionEmbedding
from umm_zoo.errors import Count


class TokenFusion(nn.Module, ABC):
    """Map from two tokens per cell of one grid to what enters the language model.

    Args:
        width: D of the language model.
        positions: added to the fused tokens, to those of each side where they stand behind each other; None adds nothing.

    Attributes:
        understanding_dim: D1, of the vision tower's tokens; None where they are not looked at.
        detail_dim: D2, channels of the codec's latents.
        tokens_per_cell: how many tokens a cell becomes.

    Shape:
        understanding ``[B, h*w, D1]`` and detail ``[B, h*w, D2]``, both in raster order, and the grid
        -> ``[B, tokens_per_cell*h*w, D]``

    Raises:
        ValueError: ``positions`` are of another width; in ``forward``, tokens that are not those of the grid, or of another width.
    """

    tokens_per_cell: ClassVar[int] = 1
    understanding_dim: int | None
    detail_dim: int

    def __init__(self, width: Count, positions: PositionEmbedding | None = None) -> None:
        super().__init__()
        if positions is not None and positions.width != width:
            raise ValueError(f"{type(self).__name__}.positions: found a width of {positions.width}, expected {width}")
        self.width, self.positions = width, positions

    @abstractmethod
    def fuse(self, understanding: Tensor, detail: Tensor) -> list[Tensor]:
        """Tokens ``[B, h*w, D]``, of which there are ``tokens_per_cell``."""

    def forward(self, understanding: Tensor, detail: Tensor, grid: Grid) -> Tensor:
        """Fuse, and mark the places."""
        for name, tokens, dim in (
            ("understanding", understanding, self.understanding_dim),
            ("detail", detail, self.detail_dim),
        ):
            expected = [grid.num_cells, tokens.shape[-1] if dim is None else dim]
            if list(tokens.shape[1:]) != expected:
                found = f"{name} tokens {list(tokens.shape[1:])}"
                raise ValueError(f"{type(self).__name__}: found {found}, expected {expected} on a grid of {grid.h} x {grid.w}")
        fused = self.fuse(understanding, detail)
        return torch.cat(fused if self.positions is None else [self.positions(own, grid) for own in fused], dim=1)

    def example_inputs(self) -> tuple[Tensor, Tensor, Grid]:
        """Tokens of a grid that is not square, for ``umm_zoo.testing.check_block``."""
        return torch.randn(2, 6, self.understanding_dim or 5), torch.randn(2, 6, self.detail_dim), Grid(3, 2)


class WidthFusion(TokenFusion):
    """Both tokens of a cell beside each other in width, then one adapter (EMMA, section 3): a codec costs no further token.

    EMMA's adapter is not published; it adds 2-D positions before the language model.

    Reference: He et al., "EMMA" (arXiv 2512.04810).

    Args:
        adapter: from ``D1 + D2`` to the language model's width.
        detail_dim: D2.
        positions: see the base class.

    Raises:
        ValueError: the adapter takes no more than the detail; see the base class.
    """

    def __init__(self, adapter: Projection, detail_dim: Count, positions: PositionEmbedding | None = None) -> None:
        super().__init__(adapter.out_dim, positions)
        if adapter.in_dim <= detail_dim:
            expected = f"more than {detail_dim}, the detail's"
            raise ValueError(f"WidthFusion.adapter: found an in_dim of {adapter.in_dim}, expected {expected}")
        self.adapter, self.understanding_dim, self.detail_dim = adapter, adapter.in_dim - detail_dim, detail_dim

    def fuse(self, understanding: Tensor, detail: Tensor) -> list[Tensor]:
        """One token."""
        return [self.adapter(torch.cat([understanding, detail], dim=-1))]


class _TwoSided(TokenFusion):
    """Base of fusions whose sides have a projection each.

    Args:
        understanding, detail: projections to one width.
        positions: see the base class.

    Raises:
        ValueError: the widths differ; see the base class.
    """

    def __init__(self, understanding: Projection, detail: Projection, positions: PositionEmbedding | None = None) -> None:
        super().__init__(understanding.out_dim, positions)
        if detail.out_dim != understanding.out_dim:
            found = f"projections to {understanding.out_dim} and {detail.out_dim}"
            raise ValueError(f"{type(self).__name__}: found {found}, expected one width")
        self.understanding, self.detail = understanding, detail
        self.understanding_dim, self.detail_dim = understanding.in_dim, detail.in_dim


class LengthFusion(_TwoSided):
    """All tokens of the tower, then all of the codec, each side through its own projection: the control, twice as long."""

    tokens_per_cell = 2

    def fuse(self, understanding: Tensor, detail: Tensor) -> list[Tensor]:
        """Two tokens."""
        return [self.understanding(understanding), self.detail(detail)]


class SumFusion(_TwoSided):
    """Sum of both tokens of a cell, each through its own projection; of linear ones it is ``WidthFusion`` with one bias more."""

    def fuse(self, understanding: Tensor, detail: Tensor) -> list[Tensor]:
        """One token."""
        return [self.understanding(understanding) + self.detail(detail)]


class DetailOnly(TokenFusion):
    """The codec's tokens alone, through one projection: the control of what a tower adds.

    Args:
        detail: projection to the language model's width.
        positions: see the base class.
    """

    understanding_dim = None

    def __init__(self, detail: Projection, positions: PositionEmbedding | None = None) -> None:
        super().__init__(detail.out_dim, positions)
        self.detail, self.detail_dim = detail, detail.in_dim

    def fuse(self, understanding: Tensor, detail: Tensor) -> list[Tensor]:
        """One token."""
        return [self.detail(detail)]
