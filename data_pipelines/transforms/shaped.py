"""Policies that keep about the shape of an image: aspect-ratio buckets, and Qwen2-VL's native resolution."""

from __future__ import annotations

import math
from bisect import bisect
from functools import lru_cache
from itertools import pairwise
from typing import Annotated

from annotated_types import Interval
from PIL import Image

from data_pipelines.transforms.resize import Cropping, Resize
from umm_zoo.errors import Count, Share, UserError


class Bucket(Cropping):
    """Resize to cover the nearest of a few sizes and cut of the centre: little is lost, and many images are of one size.

    The sizes ("buckets") have about the area of a square of edge ``size``: sides are multiples of ``multiple``, the area lies
    between ``least_area`` of that of the square and all of it, and the longer side is at most ``max_ratio`` times the shorter. A
    side for which that leaves no partner has the longest that the area allows. Nearest is the size whose aspect ratio differs least
    in its logarithm, which is where least is lost.

    With ``size`` 1024 and the default values these are the 40 sizes that SDXL was trained with (Podell et al. 2023, appendix I),
    and the upright 704 x 1344, which the paper lists lying only.

    Args:
        multiple: of which each side is one: a common multiple of the factor of the codec, and of the patch (times what is merged)
            of the language model that sees the image. A sixteenth of ``size`` makes 41 buckets, half of that 143 (SDXL: 64).
        max_ratio: of the longer side to the shorter (SDXL: 4).
        least_area: as a share of the area of the square (SDXL: 0.9, by its table).
        resample: filter.
    """

    def __init__(
        self,
        multiple: Count = 64,
        max_ratio: Annotated[float, Interval(ge=1)] = 4.0,
        least_area: Share = 0.9,
        resample: str = "bicubic",
    ) -> None:
        super().__init__(resample)
        self.multiple, self.max_ratio, self.least_area = multiple, max_ratio, least_area

    def check(self, size: int) -> None:
        """Refuse a ``size`` below ``multiple``."""
        if size < self.multiple:
            raise UserError("", f"{size} pixels", f"at least the {self.multiple} of which sides are multiples")

    def sizes(self, size: int) -> tuple[tuple[int, int], ...]:
        """Width and height of every bucket, the tallest first."""
        return _buckets(size, self.multiple, self.max_ratio, self.least_area)[0]

    def output_size(self, width: int, height: int, size: int) -> tuple[int, int]:
        """The nearest bucket."""
        sizes, bounds = _buckets(size, self.multiple, self.max_ratio, self.least_area)
        return sizes[bisect(bounds, math.log(width / height))]


@lru_cache(64)
def _buckets(size: int, multiple: int, max_ratio: float, least_area: float) -> tuple[tuple[tuple[int, int], ...], list[float]]:
    """The sizes by aspect ratio, and the logarithms of aspect ratio at which one ends and the next begins."""
    area, square = size * size, size // multiple * multiple
    found = {(square, square)}
    for side in range(multiple, int(size * math.sqrt(max_ratio)) + 1, multiple):
        longest = area // side // multiple * multiple
        others = [other for other in range(multiple, longest + 1, multiple) if side * other >= least_area * area] or [longest]
        found |= {pair for other in others if other for pair in ((side, other), (other, side))}
    found = {pair for pair in found if max(pair) <= max_ratio * min(pair)}
    by_ratio = {width / height: (width, height) for width, height in sorted(found)}  # of one ratio the largest
    logarithms = [math.log(ratio) for ratio in sorted(by_ratio)]
    bounds = [(a + b) / 2 for a, b in pairwise(logarithms)]
    return tuple(by_ratio[ratio] for ratio in sorted(by_ratio)), bounds


class Native(Resize):
    """Resize to sides that are multiples of ``patch``, at about the resolution of the image: everything is seen, hardly distorted.

    Qwen2-VL's ``smart_resize`` (Wang et al. 2024; the same in Qwen2.5-VL): each side to the nearest multiple, and both smaller or
    larger where that makes more or fewer tokens than wanted. An image with a side more than 200 times the other is refused.

    Args:
        min_tokens: fewest patches (the release: 4).
        max_tokens: most patches; None for as many as a square of edge ``size`` has pixels for (the release: 16384).
        patch: pixels a side of what becomes one token: 14 pixels, of which 2 x 2 are merged.
        resample: filter.
    """

    def __init__(
        self, min_tokens: Count = 4, max_tokens: Count | None = None, patch: Count = 28, resample: str = "bicubic"
    ) -> None:
        super().__init__(resample)
        self.min_tokens, self.max_tokens, self.patch = min_tokens, max_tokens, patch

    def check(self, size: int) -> None:
        """Refuse fewer pixels at most than at least."""
        if self._most(size) < (fewest := self.min_tokens * self.patch**2):
            side = math.ceil(math.sqrt(fewest))
            expected = f"at least {fewest}, for min_tokens={self.min_tokens} patches of {self.patch} x {self.patch}"
            raise UserError("", f"at most {self._most(size)} pixels", f"{expected} (an edge of {side})")

    def _most(self, size: int) -> int:
        return size**2 if self.max_tokens is None else self.max_tokens * self.patch**2

    def output_size(self, width: int, height: int, size: int) -> tuple[int, int]:
        """The nearest multiples, within the numbers of tokens."""
        patch, most, fewest = self.patch, self._most(size), self.min_tokens * self.patch**2
        sides = width, height
        columns, rows = (round(side / patch) * patch for side in sides)
        if columns * rows > most:
            shrink = math.sqrt(height * width / most)
            columns, rows = (max(patch, math.floor(side / shrink / patch) * patch) for side in sides)
        elif columns * rows < fewest:
            grow = math.sqrt(fewest / (height * width))
            columns, rows = (math.ceil(side * grow / patch) * patch for side in sides)
        return columns, rows

    def fit(self, image: Image.Image, output: tuple[int, int]) -> Image.Image:
        """Resize; the aspect ratio changes by less than a patch."""
        return self.resized(image, output)

    def images(self, image: Image.Image, size: int, full: tuple[int, int] | None = None) -> list[Image.Image]:
        """The one image.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        width, height = full or image.size
        if max(width, height) > 200 * min(width, height):
            raise ValueError(f"an image of {width} x {height}, sides of at most 1 to 200 are taken")
        return super().images(image, size, full)
