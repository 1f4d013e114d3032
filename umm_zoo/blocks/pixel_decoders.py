"""Decoders of visual tokenizers: tokens of a grid to the pixels of an image, in one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from umm_zoo.batch import Grid
from umm_zoo.blocks.positions import PositionEmbedding, SineCosine2d, stretched
from umm_zoo.blocks.transformer import PlainBlock
from umm_zoo.errors import Count, several


class PixelDecoder(nn.Module, ABC):
    """Map from the tokens of an image to its pixels.

    Shape:
        ``[B, h*w, in_dim]`` in raster order and the grid -> ``[B, 3, h*f, w*f]``, about [-1, 1], not clamped

    Attributes:
        in_dim: width of the tokens.
        upsampling: f, pixels per token along one side.
    """

    in_dim: int
    upsampling: int

    @abstractmethod
    def forward(self, tokens: Tensor, grid: Grid, own: Grid | None = None) -> Tensor:
        """Decode; ``own`` is the grid of training, whose positions, where there are any, are stretched over another."""

    def example_inputs(self) -> tuple[Tensor, Grid]:
        """Tokens of a grid that is not square, for ``umm_zoo.testing.check_block``."""
        return torch.randn(2, 12, self.in_dim), Grid(3, 4)


class ViTPixelDecoder(PixelDecoder):
    """A transformer over the tokens, and a patch of pixels for each (ViT-VQGAN, Yu et al., 2021, arXiv 2110.04627).

    Args:
        in_dim: width of the tokens.
        patch: f.
        width, depth, heads: of the transformer.
        positions: None is fixed sines and cosines.
        tanh_head: Linear, tanh, Linear in place of one linear layer, as QLIP has it.
    """

    def __init__(
        self,
        in_dim: Count,
        patch: Count,
        width: Count,
        depth: Count,
        heads: Count,
        positions: PositionEmbedding | None = None,
        tanh_head: bool = False,
    ) -> None:
        super().__init__()
        self.in_dim, self.upsampling = in_dim, patch
        self.enter, self.positions = nn.Linear(in_dim, width), positions or SineCosine2d(width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, ratio=4) for _ in range(depth))
        self.norm, pixels = nn.LayerNorm(width), nn.Linear(width, 3 * patch**2)
        self.head: nn.Module = nn.Sequential(nn.Linear(width, width), nn.Tanh(), pixels) if tanh_head else pixels

    def forward(self, tokens: Tensor, grid: Grid, own: Grid | None = None) -> Tensor:
        """See the base class."""
        tokens = stretched(self.positions, self.enter(tokens), grid, own)
        for block in self.blocks:
            tokens = block(tokens)
        pixels = self.head(self.norm(tokens))
        return rearrange(pixels, "B (h w) (c p q) -> B c (h p) (w q)", h=grid.h, w=grid.w, p=self.upsampling, q=self.upsampling)


class ConvPixelDecoder(PixelDecoder):
    """A convolutional decoder: residual blocks, and a nearest-neighbour doubling of the sides between two levels.

    The shape of VQGAN's decoder without its attention (Esser et al., 2021, arXiv 2012.09841), as DualToken decodes.

    Args:
        in_dim: width of the tokens.
        channels: of the levels, coarse to fine; f is 2 to the power of their number less one.
        blocks: residual blocks per level.
        groups: of the group norms; every number of channels is a multiple of it.

    Raises:
        ValueError: no level, or channels that are no multiple of ``groups``.
    """

    def __init__(self, in_dim: Count, channels: Sequence[Count], blocks: Count = 2, groups: Count = 8) -> None:
        super().__init__()
        several("channels", channels, int)
        if not channels or any(count % groups for count in channels):
            raise ValueError(f"ConvPixelDecoder.channels: found {list(channels)}, expected one or more multiples of {groups}")
        self.in_dim, self.upsampling = in_dim, 2 ** (len(channels) - 1)
        self.enter = nn.Conv2d(in_dim, channels[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for before, after in zip((channels[0], *channels), channels, strict=False):
            widths = [before, *[after] * blocks]
            self.levels.append(nn.Sequential(*(_Residual(a, b, groups) for a, b in pairwise(widths))))
        self.norm = nn.GroupNorm(groups, channels[-1])
        self.out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, tokens: Tensor, grid: Grid, own: Grid | None = None) -> Tensor:
        """See the base class; there are no positions."""
        cells = self.enter(tokens.transpose(1, 2).unflatten(2, (grid.h, grid.w)))
        for place, level in enumerate(self.levels):
            cells = level(F.interpolate(cells, scale_factor=2.0) if place else cells)
        pixels: Tensor = self.out(F.silu(self.norm(cells)))
        return pixels


class _Residual(nn.Module):
    """Two convolutions, each behind a group norm and a SiLU, added to what came in."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, after), nn.Conv2d(after, after, 3, padding=1)
        self.past = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, cells: Tensor) -> Tensor:
        """Add."""
        made = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(cells))))))
        added: Tensor = self.past(cells) + made
        return added
