"""Codec of image tokens over a fixed book of patches: no network, and nothing to train."""

from __future__ import annotations

import torch
from torch import Tensor

from umm_zoo.backbones.token_codec import TokenCodec
from umm_zoo.batch import Grid


class PatchCodebook(TokenCodec):
    """Codec in which a token is a patch of the image: the nearest of the book, by squared difference.

    An image made of patches of the book is given back bit by bit; any other becomes the nearest such mosaic.

    Shape:
        - codes: ``[M, 3, H, W]`` to ``[M, N, 1]``, N = H/p * W/p
        - images: ``[M, N, 1]`` to ``[M, 3, H, W]``

    Args:
        patches: ``[K, 3, p, p]`` in [-1, 1].

    Raises:
        ValueError: they are not square, or have other than three colours.
    """

    exact = ("patches",)
    patches: Tensor

    def __init__(self, patches: Tensor) -> None:
        super().__init__()
        if patches.ndim != 4 or patches.shape[1] != 3 or patches.shape[2] != patches.shape[3]:
            raise ValueError(f"PatchCodebook.patches: found {list(patches.shape)}, expected [K, 3, p, p]")
        self.num_codes, self.downsampling = len(patches), patches.shape[-1]
        self.register_buffer("patches", patches.float())

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """See ``TokenCodec.codes``."""
        grid, side = self.token_grid(*images.shape[-2:]), self.downsampling
        cells = images.to(self.patches.dtype).unflatten(3, (grid.w, side)).unflatten(2, (grid.h, side))  # [M, 3, h, p, w, p]
        cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)  # [M*N, 3pp]
        # differences are taken one by one: from inner products, patches that differ in little would be confused
        distances = torch.cdist(cells, self.patches.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        return distances.argmin(dim=1).view(len(images), grid.num_cells, 1)

    @torch.no_grad()
    def images(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        """See ``TokenCodec.images``."""
        grid = self.grid_of(codes, grid)
        cells = self.patches[codes[..., 0]].unflatten(1, tuple(grid))  # [M, h, w, 3, p, p]
        return cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
