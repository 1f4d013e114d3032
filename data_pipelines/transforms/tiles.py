"""LLaVA-1.6's tiles: one image becomes an overview and parts at full resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image

from data_pipelines.transforms.resize import Resize, centred, noted

#: Columns and rows of tiles in LLaVA-1.6, in the order in which the first of two that are equally good is taken.
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


class Tiles(Resize):
    """Overview of an image, squeezed to a square, followed by its tiles, row by row: squares of edge ``size`` of it all.

    LLaVA-1.6's "anyres" (Liu et al. 2024): of several grids of tiles the one is taken in which most pixels of the image are kept,
    then the one with the smallest border; the image is resized to fit in it and padded. Every tile is an image of the row, and the
    image's ``<image>`` marker is repeated for it, which is the merge type "flat" of the release.

    Where grids are equally good, as for small squares, the first is taken with width before height, as in the release; the copy in
    transformers reads the same list with height first.

    Args:
        grids: columns and rows of the grids to choose from.
        fill: grey value of the border, 0 to 255 (the release: black).
        resample: filter.
    """

    def __init__(self, grids: Sequence[Sequence[int]] = GRIDS, fill: int = 0, resample: str = "bicubic") -> None:
        super().__init__(resample)
        pairs = tuple(tuple(grid) for grid in grids)
        if not pairs or any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
            raise ValueError(f"grids: found {list(grids)}, expected columns and rows of each, such as [[1, 2], [2, 1], [2, 2]]")
        self.grids, self.fill = pairs, fill

    def output_size(self, width: int, height: int, size: int) -> tuple[int, int]:
        """A square, for the overview and every tile."""
        return size, size

    def fit(self, image: Image.Image, output: tuple[int, int]) -> Image.Image:
        """The overview."""
        return self.resized(image, output)

    def grid(self, width: int, height: int, size: int) -> tuple[int, int]:
        """Columns and rows of the tiles of an image."""
        return _best_grid(width, height, size, self.grids)

    def num_images(self, width: int, height: int, size: int) -> int:
        """The overview and its tiles."""
        return 1 + math.prod(self.grid(width, height, size))

    def images(self, image: Image.Image, size: int, full: tuple[int, int] | None = None) -> list[Image.Image]:
        """Overview and tiles."""
        image, (columns, rows) = noted(image, full), self.grid(*(full or image.size), size)
        inner = self.resized(image, self._inside(*(full or image.size), size))
        whole = centred(inner, (columns * size, rows * size), self.fill)
        corners = [(column * size, row * size) for row in range(rows) for column in range(columns)]
        tiles = [whole.crop((left, top, left + size, top + size)) for left, top in corners]
        return [self.fit(image, (size, size)), *tiles]

    def least(self, width: int, height: int, size: int) -> tuple[int, int]:
        """What the tiles show, and no less than the overview."""
        columns, rows = self._inside(width, height, size)
        return max(columns, size), max(rows, size)

    def _inside(self, width: int, height: int, size: int) -> tuple[int, int]:
        """Width and height of the image within its grid."""
        most = [count * size for count in self.grid(width, height, size)]
        scale = min(most[0] / width, most[1] / height)
        if most[0] / width < most[1] / height:
            return most[0], min(math.ceil(height * scale), most[1])
        return min(math.ceil(width * scale), most[0]), most[1]


@lru_cache(4096)
def _best_grid(width: int, height: int, size: int, grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    def goodness(grid: tuple[int, int]) -> tuple[int, int]:
        columns, rows = grid[0] * size, grid[1] * size
        scale = min(columns / width, rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - columns * rows

    return max(grids, key=goodness)
