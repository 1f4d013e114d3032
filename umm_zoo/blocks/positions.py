"""Position embeddings of grids: tokens in, tokens out, so that adding, rotating and concatenating all fit."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.by_shape import by_shape
from umm_zoo.batch import Grid
from umm_zoo.errors import Count, Positive, Weight


class PositionEmbedding(nn.Module, ABC):
    """Marks on the tokens of a grid of where they stand.

    Attributes:
        width: D.

    Shape:
        ``[B, h*w, D]`` in raster order and the grid -> ``[B, h*w, D]``.
    """

    width: int

    @abstractmethod
    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Mark."""

    def example_inputs(self) -> tuple[Tensor, Grid]:
        """Tokens of a grid that is not square, for ``umm_zoo.testing.check_block``."""
        return torch.randn(2, 12, self.width), Grid(3, 4)


def stretched(positions: PositionEmbedding, tokens: Tensor, grid: Grid, own: Grid | None) -> Tensor:
    """Mark the tokens of ``grid`` with the marks of the grid ``own``, interpolated (bicubic) as vision transformers do.

    Args:
        positions: whose marks are added to tokens.
        tokens: ``[B, h*w, D]``.
        grid: of the tokens.
        own: that the marks were trained on; None is ``grid``.
    """
    if own is None or own == grid:
        marked: Tensor = positions(tokens, grid)
        return marked
    marks: Tensor = positions(tokens.new_zeros(1, own.num_cells, tokens.shape[-1]), own)
    cells = marks.transpose(1, 2).unflatten(2, tuple(own)).float()
    wide = F.interpolate(cells, size=tuple(grid), mode="bicubic", align_corners=False)
    return tokens + wide.flatten(2).transpose(1, 2).to(tokens.dtype)


class CroppedTable2d(PositionEmbedding):
    """A learned vector added per place: a large table of which a smaller grid takes the centre.

    WeMMU: rows floor((Hmax - h) / 2) on, columns likewise. Its table's size and start are not published; 64 x 64 of zeros is our
    choice, so that training starts from the language model's own states.

    Reference: Yang et al., "WeMMU" (arXiv 2512.02536).

    Args:
        width: D.
        max_height, max_width: rows and columns of the table.
        init_std: of the initial vectors.

    Raises:
        ValueError: a grid is larger than the table.
    """

    def __init__(self, width: Count, max_height: Count = 64, max_width: Count = 64, init_std: Weight = 0.0) -> None:
        super().__init__()
        self.width = width
        self.table = nn.Parameter(torch.randn(max_height, max_width, width) * init_std)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Add the centre of the table."""
        return tokens + centre(self.table, grid).to(tokens.dtype)


class SineCosine2d(PositionEmbedding):
    """Fixed sines and cosines of row and column, added; nothing is learned, any grid fits.

    Args:
        width: D.
        scale: factor on the sines and cosines.

    Raises:
        ValueError: the width is not a multiple of 4.
    """

    def __init__(self, width: Count, scale: Positive = 1.0) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"SineCosine2d.width: found {width}, expected a multiple of 4")
        self.width, self.scale = width, scale

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Add them."""
        return tokens + self.scale * _sines(tokens.device, grid.h, grid.w, self.width, tokens.dtype)


@by_shape
def _sines(height: int, width: int, size: int, dtype: torch.dtype) -> Tensor:
    """Sines and cosines of the rows, then of the columns, ``[h*w, size]``."""
    count = size // 4
    frequencies = 10000.0 ** -(torch.arange(count) / count)
    rows, columns = (torch.arange(side)[:, None] * frequencies for side in (height, width))  # [h, size/4], [w, size/4]
    parts = [rows.sin()[:, None], rows.cos()[:, None], columns.sin()[None], columns.cos()[None]]
    return torch.cat([part.expand(height, width, -1) for part in parts], dim=-1).flatten(0, 1).to(dtype)


def centre(table: Tensor, grid: Grid) -> Tensor:
    """The centre of a table ``[H, W, D]`` as ``[h*w, D]`` in raster order; odd remainders go to the end.

    Raises:
        ValueError: the grid is larger than the table.
    """
    height, width = table.shape[:2]
    if grid.h > height or grid.w > width:
        raise ValueError(f"found a grid of {grid.h} x {grid.w} tokens, expected at most the table's {height} x {width}")
    top, left = (height - grid.h) // 2, (width - grid.w) // 2
    return table[top : top + grid.h, left : left + grid.w].flatten(0, 1)
