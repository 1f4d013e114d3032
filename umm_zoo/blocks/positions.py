"""Where a token of a grid stands, told to the tokens: tokens in, tokens out, so that adding, rotating and concatenating all fit."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.batch import Grid


class PositionEmbedding(nn.Module, ABC):
    """Marks the tokens of a grid with their places.

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


class NoPosition(PositionEmbedding):
    """Leaves the tokens as they are.

    Shape:
        See ``PositionEmbedding``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The tokens."""
        return tokens


class CroppedTable2d(PositionEmbedding):
    """Adds a learned vector per place: a large table of which a smaller grid takes the centre.

    WeMMU: rows floor((Hmax - h) / 2) on, columns likewise. Its table's size and start are not published; 64 x 64 of zeros is our
    choice, so that training starts from the language model's own states.

    Reference: Yang et al., "WeMMU" (arXiv 2512.02536).

    Shape:
        See ``PositionEmbedding``.

    Args:
        width: D.
        max_height, max_width: rows and columns of the table.
        init_std: of the initial vectors.

    Raises:
        ValueError: a grid is larger than the table.
    """

    def __init__(self, width: int, max_height: int = 64, max_width: int = 64, init_std: float = 0.0) -> None:
        super().__init__()
        self.width = width
        self.table = nn.Parameter(torch.randn(max_height, max_width, width) * init_std)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Add the centre of the table."""
        return tokens + centre(self.table, grid).to(tokens.dtype)


class InterpolatedTable2d(PositionEmbedding):
    """Adds a learned vector per place: a table of one size, stretched bilinearly to the grid, as vision transformers do.

    Shape:
        See ``PositionEmbedding``.

    Args:
        width: D.
        height, columns: size of the table, which a grid of that size takes as it is.
        init_std: of the initial vectors (our choice: zeros, as ``CroppedTable2d``).
    """

    def __init__(self, width: int, height: int = 16, columns: int = 16, init_std: float = 0.0) -> None:
        super().__init__()
        self.width = width
        self.table = nn.Parameter(torch.randn(height, columns, width) * init_std)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Add the stretched table."""
        stretched = F.interpolate(self.table.permute(2, 0, 1)[None], size=tuple(grid), mode="bilinear", align_corners=False)
        return tokens + stretched.flatten(2).transpose(1, 2).to(tokens.dtype)


class AxisTables2d(PositionEmbedding):
    """Adds a learned vector per row and one per column, counted from the top left corner.

    Shape:
        See ``PositionEmbedding``.

    Args:
        width: D.
        max_height, max_width: number of vectors of each kind.
        init_std: of the initial vectors (our choice: zeros, as ``CroppedTable2d``).

    Raises:
        ValueError: a grid is larger than that.
    """

    def __init__(self, width: int, max_height: int = 64, max_width: int = 64, init_std: float = 0.0) -> None:
        super().__init__()
        self.width = width
        self.rows = nn.Parameter(torch.randn(max_height, width) * init_std)
        self.columns = nn.Parameter(torch.randn(max_width, width) * init_std)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Add both."""
        _assert_fits(grid, len(self.rows), len(self.columns))
        table = self.rows[: grid.h, None] + self.columns[None, : grid.w]  # [h, w, D]
        return tokens + table.flatten(0, 1).to(tokens.dtype)


class SineCosine2d(PositionEmbedding):
    """Adds fixed sines and cosines of row and column; nothing is learned, any grid fits.

    Shape:
        See ``PositionEmbedding``.

    Args:
        width: D.
        scale: factor on the sines and cosines.

    Raises:
        ValueError: the width is not a multiple of 4.
    """

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"SineCosine2d.width: found {width}, expected multiples of 4")
        self.width, self.scale = width, scale

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Add them."""
        frequencies = _frequencies(self.width // 4, tokens.device)
        rows, columns = (_angles(size, frequencies) for size in grid)  # [h, D/4], [w, D/4]
        parts = [rows.sin()[:, None], rows.cos()[:, None], columns.sin()[None], columns.cos()[None]]
        table = torch.cat([part.expand(grid.h, grid.w, -1) for part in parts], dim=-1)  # [h, w, D]
        return tokens + self.scale * table.flatten(0, 1).to(tokens.dtype)


class Rotary2d(PositionEmbedding):
    """Rotates pairs of channels by angles that grow with row (first half) and column (second half); lengths stay.

    Shape:
        See ``PositionEmbedding``.

    Raises:
        ValueError: the width is not a multiple of 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"Rotary2d.width: found {width}, expected multiples of 4")
        self.width = width

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Rotate."""
        frequencies = _frequencies(self.width // 4, tokens.device)
        rows, columns = (_angles(size, frequencies) for size in grid)
        angles = torch.cat([rows[:, None].expand(-1, grid.w, -1), columns[None].expand(grid.h, -1, -1)], dim=-1)  # [h, w, D/2]
        angles = angles.flatten(0, 1).to(tokens.dtype)
        even, odd = tokens.unflatten(-1, (-1, 2)).unbind(-1)  # [B, h*w, D/2]
        turned = torch.stack([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], dim=-1)
        return turned.flatten(-2)


class ConcatenatedCoordinates(PositionEmbedding):
    """Appends the height and width of each token's centre, in (-1, 1), to its channels and projects back.

    Unlike a table it knows no size: the same place in a larger image has the same coordinates.

    Shape:
        See ``PositionEmbedding``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.projection = nn.Linear(width + 2, width)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Append and project."""
        rows, columns = ((2 * torch.arange(size, device=tokens.device) + 1) / size - 1 for size in grid)
        places = torch.stack([rows.repeat_interleave(grid.w), columns.repeat(grid.h)], dim=-1)  # [h*w, 2]
        return self.projection(torch.cat([tokens, places.to(tokens.dtype).expand(len(tokens), -1, -1)], dim=-1))


def centre(table: Tensor, grid: Grid) -> Tensor:
    """The centre of a table ``[H, W, D]`` as ``[h*w, D]`` in raster order; odd remainders go to the end.

    Raises:
        ValueError: the grid is larger than the table.
    """
    _assert_fits(grid, table.shape[0], table.shape[1])
    top, left = (table.shape[0] - grid.h) // 2, (table.shape[1] - grid.w) // 2
    return table[top : top + grid.h, left : left + grid.w].flatten(0, 1)


def _assert_fits(grid: Grid, height: int, width: int) -> None:
    if grid.h > height or grid.w > width:
        raise ValueError(f"a grid of {grid.h} x {grid.w} tokens does not fit into a table of {height} x {width}")


def _frequencies(count: int, device: torch.device) -> Tensor:
    return 10000.0 ** -(torch.arange(count, device=device) / count)


def _angles(size: int, frequencies: Tensor) -> Tensor:
    return torch.arange(size, device=frequencies.device)[:, None] * frequencies
