"""Positions of M-RoPE (time, row, column) of rows of text and images, as models of the Qwen-VL family count them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from umm_zoo.backbones.by_shape import by_shape
from umm_zoo.batch import Grid


def row_positions(attention_mask: Tensor, image_mask: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Position ids of rows, ``[3, B, L]``, 0 on padding: the library's ``get_rope_index`` of text and images.

    Text counts on by one; an image's tokens stand in its rows and columns, and what follows begins behind the longer side. Each
    kind of row (its length, where its images are, their grids) is worked out once.

    Args:
        attention_mask, image_mask: ``[B, L]`` bool, of the host.
        grids: of the images, row after row.

    Reference: Wang et al., "Qwen2-VL" (arXiv 2409.12191), section 2.1.
    """
    real, shown, left = attention_mask.numpy(), image_mask.numpy(), iter(grids)
    ids = np.zeros((3, *real.shape), dtype=np.int64)
    for row, own in enumerate(real):
        tokens, images, first = np.flatnonzero(shown[row][own]), list[tuple[int, Grid]](), 0
        while first < len(tokens):
            images.append((int(tokens[first]), grid := next(left)))
            first += grid.num_cells
        ids[:, row, own] = _row(int(own.sum()), tuple(images))
    return torch.from_numpy(ids)


@by_shape
def grid_places(grid: Grid) -> Tensor:
    """Time, row and column of a grid's tokens in raster order, ``[3, h*w]``."""
    rows, columns = torch.arange(grid.h).repeat_interleave(grid.w), torch.arange(grid.w).repeat(grid.h)
    return torch.stack([torch.zeros_like(rows), rows, columns])


@lru_cache(maxsize=256)
def _row(length: int, images: tuple[tuple[int, Grid], ...]) -> NDArray[np.int64]:
    """Ids of a row without padding, ``[3, L]``; images by their first token."""
    ids, at, position = np.empty((3, length), dtype=np.int64), 0, 0
    for first, grid in images:
        ids[:, at:first] = np.arange(position, position + first - at)
        position, at = position + first - at, first + grid.num_cells
        ids[:, first:at] = position + grid_places(torch.device("cpu"), grid).numpy()
        position += max(grid)
    ids[:, at:] = np.arange(position, position + length - at)
    return ids
