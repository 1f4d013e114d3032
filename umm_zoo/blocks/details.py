"""Fine detail of the input images for the language model, beside what its own vision tower says."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from umm_zoo.batch import Grid
from umm_zoo.blocks.positions import PositionEmbedding
from umm_zoo.blocks.transformer import as_tokens


class DetailBranch(nn.Module, ABC):
    """Turns codec latents of input images into tokens for the query pathway, one per token of the vision tower.

    The method resizes each image so that its latent has the tower's token grid, and gives both tokens of a place the same
    position ids.

    Attributes:
        latent_channels: C of the codec.
        width: language-model width D.

    Shape:
        ``[M, C, h, w]`` -> ``[M, h*w, D]`` in raster order.
    """

    latent_channels: int
    width: int

    @abstractmethod
    def forward(self, latents: Tensor) -> Tensor:
        """Make the tokens."""

    def example_inputs(self) -> tuple[Tensor]:
        """Latents of an image that is not square, for ``umm_zoo.testing.check_block``."""
        return (torch.randn(2, self.latent_channels, 3, 4),)


class VAEDetail(DetailBranch):
    """One linear layer from the latent of the drawing model's own codec to the width of the language model.

    WeMMU's Figure 4 compares six connections; this one converges fastest and most stably. It restores the detail that language
    model and queries lose, although the vision tower had it. Whether the paper scales the latents first is not published: here they
    are normalised, as the codec gives them.

    Reference: Yang et al., "WeMMU" (arXiv 2512.02536).

    Shape:
        See ``DetailBranch``.

    Args:
        latent_channels: 32 for Sana's codec.
        width: 2048 for Qwen2.5-VL-3B.
        positions: added to the tokens; None, as in the paper, leaves places to the position ids alone (see ``PlacedQueries``).

    Raises:
        ValueError: ``positions`` are of another width.
    """

    def __init__(self, latent_channels: int, width: int, positions: PositionEmbedding | None = None) -> None:
        super().__init__()
        if positions is not None and positions.width != width:
            raise ValueError(f"VAEDetail: positions.width is {positions.width}, width is {width}")
        self.latent_channels, self.width = latent_channels, width
        self.projection, self.positions = nn.Linear(latent_channels, width), positions

    def forward(self, latents: Tensor) -> Tensor:
        """Project every cell."""
        tokens = self.projection(as_tokens(latents).to(self.projection.weight.dtype))
        return tokens if self.positions is None else self.positions(tokens, Grid(*latents.shape[-2:]))
