"""Detail branches: tokens of fine detail of the input images, beside those of the vision tower.

They stand behind a prompt whose image tokens a frozen model has read already, so a ``TokenFusion``, which makes what a model is to
read, has no place here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from umm_zoo.backbones.devices import send
from umm_zoo.batch import Grid
from umm_zoo.blocks.positions import PositionEmbedding
from umm_zoo.blocks.transformer import as_tokens
from umm_zoo.errors import Count


@dataclass
class Details:
    """K tokens of fine detail of a row's input images, beside those of the vision tower.

    Shape:
        - tokens: ``[B, K, D]``, zeros on padding
        - positions: ``[3, B, K]``, those of the vision tower's tokens of the same places
        - images: ``[B, K]``, which image of the row a token belongs to, -1 on padding
        - unused: scalar zero that depends on the branch where no image does, for all ranks must touch the same parameters
        - lengths: how many of a row's K are real, B numbers that nobody waits for a GPU to know; None where there is no branch
    """

    tokens: Tensor
    positions: Tensor
    images: Tensor
    unused: Tensor | None = None
    lengths: Sequence[int] | None = None

    @classmethod
    def none(cls, like: Tensor, unused: Tensor | None = None) -> Details:
        """No tokens, beside ``[B, *, D]`` of the same width and type; of a branch where something is ``unused``."""
        positions = torch.zeros(3, len(like), 0, dtype=torch.long, device=like.device)
        lengths = None if unused is None else [0] * len(like)
        return cls(like.new_zeros(len(like), 0, like.shape[-1]), positions, positions[0], unused, lengths)

    def select(self, rows: Sequence[int]) -> Details:
        """The rows of these numbers, without what is padding in all of them where that is known."""
        chosen = row_numbers(rows, self.tokens.device)
        lengths = None if self.lengths is None else [self.lengths[row] for row in rows]
        end = self.count if lengths is None else max(lengths)
        tokens, positions, images = self.tokens[chosen, :end], self.positions[:, chosen, :end], self.images[chosen, :end]
        return Details(tokens, positions, images, self.unused, lengths)

    @property
    def count(self) -> int:
        """K."""
        return self.tokens.shape[1]

    @property
    def mask(self) -> Tensor:
        """``[B, K]`` bool, False on padding."""
        return self.images >= 0


def row_numbers(rows: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of rows as a tensor ``[m]``; nobody waits for a GPU."""
    return send(torch.tensor(rows), device)


class DetailBranch(nn.Module, ABC):
    """Map from codec latents of input images to tokens for the query pathway, one per token of the vision tower.

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
    """One linear layer from the latent of the decoder's own codec to the width of the language model.

    WeMMU's Figure 4 compares six connections; this one converges fastest and most stably. It restores the detail that language
    model and queries lose, although the vision tower had it. Whether the paper scales the latents first is not published: here they
    are normalised, as the codec gives them.

    Reference: Yang et al., "WeMMU" (arXiv 2512.02536).

    Args:
        latent_channels: 32 for Sana's codec.
        width: 2048 for Qwen2.5-VL-3B.
        positions: added to the tokens; None, as in the paper, leaves places to the position ids alone (see ``PlacedQueries``).

    Raises:
        ValueError: ``positions`` are of another width.
    """

    def __init__(self, latent_channels: Count, width: Count, positions: PositionEmbedding | None = None) -> None:
        super().__init__()
        if positions is not None and positions.width != width:
            raise ValueError(f"VAEDetail.positions: found a width of {positions.width}, expected {width}")
        self.latent_channels, self.width = latent_channels, width
        self.projection, self.positions = nn.Linear(latent_channels, width), positions

    def forward(self, latents: Tensor) -> Tensor:
        """Project every cell."""
        tokens = self.projection(as_tokens(latents).to(self.projection.weight.dtype))
        return tokens if self.positions is None else self.positions(tokens, Grid(*latents.shape[-2:]))
