"""Tokens of a language model that are patches of a latent at some time between data and noise."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from umm_zoo.batch import Grid
from umm_zoo.blocks.transformer import position_table, time_embedding
from umm_zoo.errors import Count, UserError


class LatentTokens(nn.Module):
    """Latents in and velocities out of a language model: a linear layer each way, the time and the place added on the way in.

    Bagel (released ``bagel.py``): ``latent_in(x_t) + time_in(t) + table[row, column]``, no modulation; the way out begins at zero.
    Its release calls them ``vae2llm``, ``llm2vae``, ``time_embedder.mlp`` and ``latent_pos_embed.pos_embed``; the last is fixed.

    Shape:
        - enter: latents ``[M, C, h, w]``, times ``[M]`` in [0, 1] -> ``[M, N, D]``, N = h/p * w/p in raster order
        - leave: states ``[M, N, D]`` and the latent's grid -> ``[M, C, h, w]``

    Args:
        latent_channels: C.
        width: D.
        patch: p, cells of the latent per token along one side.
        max_side: rows and columns of the table of places; 64 in the released 7B (``max_latent_size``), 32 in its code. Another
            number is another table, which loads from a checkpoint in silence in the release.

    Raises:
        ValueError: the width is not a multiple of 4.
    """

    def __init__(self, latent_channels: Count, width: Count, patch: Count = 2, max_side: Count = 64) -> None:
        super().__init__()
        self.latent_channels, self.width, self.patch, self.max_side = latent_channels, width, patch, max_side
        wide = latent_channels * patch**2
        self.latent_in, self.latent_out = nn.Linear(wide, width), nn.Linear(width, wide)
        nn.init.zeros_(self.latent_out.weight)
        nn.init.zeros_(self.latent_out.bias)
        self.time_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        table = position_table(max_side, width).to(self.latent_in.weight.dtype)
        self.register_buffer("table", table.view(max_side, max_side, width), persistent=False)

    table: Tensor

    def grid(self, latent_grid: Grid) -> Grid:
        """Tokens of a latent.

        Raises:
            UserError: it is no whole number of patches, or has more of them than the table has places.
        """
        height, width = latent_grid
        if height % self.patch or width % self.patch or max(latent_grid) > self.patch * self.max_side:
            expected = f"multiples of {self.patch}, at most {self.patch * self.max_side} along a side (max_side {self.max_side})"
            raise UserError("latents", f"a latent of {height} x {width} cells", expected)
        return Grid(height // self.patch, width // self.patch)

    def enter(self, latents: Tensor, time: Tensor) -> Tensor:
        """Tokens of latents."""
        grid, dtype = self.grid(Grid(*latents.shape[-2:])), self.latent_in.weight.dtype
        tokens = rearrange(latents, "M C (h p) (w q) -> M (h w) (p q C)", p=self.patch, q=self.patch)
        places = self.table[: grid.h, : grid.w].flatten(0, 1)
        entered: Tensor = self.latent_in(tokens.to(dtype)) + self.time_in(time_embedding(time, 256).to(dtype))[:, None]
        return entered + places.to(entered.dtype)

    def leave(self, states: Tensor, latent_grid: Grid) -> Tensor:
        """Velocities of tokens."""
        grid = self.grid(latent_grid)
        patches = self.latent_out(states.to(self.latent_out.weight.dtype))
        return rearrange(patches, "M (h w) (p q C) -> M C (h p) (w q)", h=grid.h, p=self.patch, q=self.patch)

    def parts(self) -> dict[str, nn.Module]:
        """``latent_in``, ``latent_out``, ``time_in``."""
        return {"latent_in": self.latent_in, "latent_out": self.latent_out, "time_in": self.time_in}

    def example_inputs(self) -> tuple[Tensor, Tensor]:
        """Latents that are not square, and times."""
        return torch.randn(2, self.latent_channels, 2 * self.patch, 3 * self.patch), torch.tensor([0.0, 0.5])
