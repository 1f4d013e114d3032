"""Token codecs: images to integers, and back; what an autoregressive model generates."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from umm_zoo.backbones.precision import ExactBuffers
from umm_zoo.batch import Grid
from umm_zoo.errors import UserError


class TokenCodec(ExactBuffers, ABC):
    """Map from images to the codes of their cells, in raster order, and back.

    Shape:
        - codes: ``[M, 3, H, W]`` in [-1, 1] to ``[M, N, D]`` long, D codes for each of N = H/f * W/f cells
        - images: ``[M, N, D]`` to ``[M, 3, H, W]`` in [-1, 1]

    Attributes:
        num_codes: K; a code lies in [0, K).
        downsampling: f, pixels per cell along one side.
    """

    num_codes: int
    downsampling: int

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """Numbers of codes of the first, the second … of the D codes of a cell; one code of K here."""
        return (self.num_codes,)

    @abstractmethod
    def codes(self, images: Tensor) -> Tensor:
        """Codes of images; no gradient.

        Raises:
            UserError: a side is no multiple of ``downsampling``.
        """

    @abstractmethod
    def images(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        """Images of codes whose cells form ``grid`` (None: a square); no gradient.

        Raises:
            ValueError: another number of cells.
        """

    def forward(self, images: Tensor) -> Tensor:
        """Images through their codes and back, ``[M, 3, H, W]``."""
        return self.images(self.codes(images), self.token_grid(*images.shape[-2:])).to(images.dtype)

    def example_inputs(self) -> tuple[Tensor]:
        """Images that are not square, for ``umm_zoo.testing.check_block``."""
        return (torch.rand(2, 3, 2 * self.downsampling, 3 * self.downsampling) * 2 - 1,)

    def token_grid(self, height: int, width: int) -> Grid:
        """Cells of an image of that many pixels.

        Raises:
            UserError: a side is no multiple of ``downsampling``.
        """
        unit = self.downsampling
        if height % unit or width % unit:
            raise UserError("data.image_size", f"{height} x {width} px", f"multiples of {unit} px for an image to generate")
        return Grid(height // unit, width // unit)

    def grid_of(self, codes: Tensor, grid: Grid | None = None) -> Grid:
        """The grid of N cells: as stated, else a square.

        Raises:
            ValueError: another number of cells.
        """
        side = math.isqrt(codes.shape[1])
        found = grid or Grid(side, side)
        if found.num_cells != codes.shape[1]:
            expected = f"{found.num_cells}, a grid of {found.h} x {found.w}" if grid else "the cells of a square, or their grid"
            raise ValueError(f"{type(self).__name__}.images: found {codes.shape[1]} cells, expected {expected}")
        return found
