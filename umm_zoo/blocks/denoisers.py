"""Denoisers and regression heads: networks that predict from a condition, and know no schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.batch import Tokens
from umm_zoo.blocks.transformer import (
    ModulatedBlock,
    PlainBlock,
    as_map,
    as_tokens,
    position_table,
    time_embedding,
    xavier_linears,
)
from umm_zoo.errors import Count


class Denoiser(nn.Module, ABC):
    """Prediction, from a noisy latent, the time and a condition, of whatever its objective trains.

    Shape:
        - noisy: ``[B, C, h, w]``
        - time: ``[B]``, in the unit of the objective: [0, 1] for flows, the integer index for the Gaussian process
        - condition: ``[B, N, E]``
        - output: ``[B, C, h, w]``

    Attributes:
        learned_variance: whether it gives ``[B, 2 C, h, w]``, the second half of which says the variance.
    """

    learned_variance: bool = False

    @abstractmethod
    def forward(self, noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
        """Predict."""


class DenoiserHead(Denoiser):
    """Small transformer that denoises packed latents under a language model's states, one condition vector per token.

    ROSS, released code: noisy token + position enters ``depth`` adaLN-zero blocks; the condition of token i is
    ``time_in(t) + condition_in(SiLU(h_i))`` and passes another SiLU before every modulation. It predicts the noise only (the
    variance is not learned). The caller normalises the states first (LayerNorm without affine, eps 1e-5). Initialised so that the
    first output is exactly zero; the condition therefore receives its first gradient at the third update.

    Reference: Wang et al., 2024, arXiv 2410.09575; the paper's figure shows another block, see its released code for this one.

    Shape:
        - noisy: ``[B, channels, grid, grid]``
        - time: ``[B]``, integer index
        - condition: ``[B, grid*grid, condition_dim]``
        - output: ``[B, channels, grid, grid]``

    Args:
        condition_dim: width of the language model.
        grid: image tokens per side.
        channels: of the packed latent (16 channels times 2 x 2).
        width: 1024 at depth 3 in the release (1280 at depth 8, 1536 at depth 12).
        depth: number of blocks.
        heads: 16 at every width in the release.
        trained_positions: make the sine-cosine table a parameter. The release trains it in stage 1 and not in stage 2; the default,
            a buffer, is the table as it was built or loaded.

    Raises:
        ValueError: ``heads`` or 4 does not divide ``width``, or a tensor has another shape than stated.
    """

    def __init__(
        self,
        condition_dim: Count,
        grid: Count,
        channels: Count = 64,
        width: Count = 1024,
        depth: Count = 3,
        heads: Count = 16,
        trained_positions: bool = False,
    ) -> None:
        super().__init__()
        self.condition_dim, self.grid, self.channels, self.width = condition_dim, grid, channels, width
        self.latent_in = nn.Linear(channels, width)
        self.time_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.condition_in = nn.Linear(condition_dim, width)
        self.blocks = nn.ModuleList(ModulatedBlock(width, heads) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, channels)
        table = position_table(grid, width).to(self.out.weight.dtype)[None]  # [1, N, width]
        if trained_positions:
            self.positions = nn.Parameter(table)
        else:
            self.register_buffer("positions", table)
        self.initialize()

    def initialize(self) -> None:
        """Xavier-uniform, small normal weights for the two embeddings, zeros for every modulation and the output."""
        xavier_linears(self)
        for layer in [*self.time_in, self.condition_in]:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for name, tensor in self.named_parameters():
            if "modulation" in name or name.startswith("out."):
                nn.init.zeros_(tensor)

    def forward(self, noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
        """Predict the noise."""
        self._check(noisy, condition.values)
        dtype = self.out.weight.dtype
        x = self.latent_in(as_tokens(noisy).to(dtype)) + self.positions  # [B, N, width]
        moment = self.time_in(time_embedding(time, 256).to(dtype))  # [B, width]
        guide = F.silu(moment[:, None] + self.condition_in(F.silu(condition.values.to(dtype))))  # [B, N, width]
        for block in self.blocks:
            x = block(x, guide)
        shift, scale = self.final_modulation(guide).chunk(2, dim=-1)
        return as_map(self.out(self.final_norm(x) * (1 + scale) + shift))  # [B, channels, grid, grid]

    def _check(self, noisy: Tensor, states: Tensor) -> None:
        latent, condition = [self.channels, self.grid, self.grid], [len(noisy), self.grid**2, self.condition_dim]
        if list(noisy.shape[1:]) != latent:
            raise ValueError(f"DenoiserHead.noisy: found {list(noisy.shape)}, expected {['B', *latent]}")
        if list(states.shape) != condition:
            raise ValueError(f"DenoiserHead.condition: found {list(states.shape)}, expected {condition}")


class RegressionHead(nn.Module, ABC):
    """Prediction of a target per image token straight from the condition, without noise or time.

    A subclass implements ``regress``.

    Attributes:
        condition_dim: width of the condition.
        channels: values predicted per token.

    Shape:
        - condition: ``[B, g*g, condition_dim]``
        - output: ``[B, channels, g, g]``
    """

    condition_dim: int
    channels: int

    @abstractmethod
    def regress(self, states: Tensor) -> Tensor:
        """``[B, N, condition_dim]`` -> ``[B, N, channels]``."""

    def forward(self, condition: Tokens) -> Tensor:
        """Predict, on the grid."""
        return as_map(self.regress(condition.values.to(next(self.parameters()).dtype)))


class MLPRegressionHead(RegressionHead):
    """Token-wise regression: ``num_layers - 1`` times Linear and GELU at the condition's width, then Linear to the target.

    ROSS's release leaves ``linear`` (one layer) and ``mlp2x_gelu`` (two) in its factory; which one the regression arms of the paper
    used is not stated. Two layers are our choice.

    Shape:
        ``[B, g*g, condition_dim]`` -> ``[B, channels, g, g]``.

    Raises:
        ValueError: ``num_layers`` is below 1.
    """

    def __init__(self, condition_dim: Count, channels: Count, num_layers: Count = 2) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"MLPRegressionHead.num_layers: found {num_layers}, expected 1 or more")
        self.condition_dim, self.channels = condition_dim, channels
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            layers += [nn.Linear(condition_dim, condition_dim), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(condition_dim, channels))

    def regress(self, states: Tensor) -> Tensor:
        """Apply to every token alone."""
        return self.layers(states)


class AttentionRegressionHead(RegressionHead):
    """Self-attention regression of the size of ``DenoiserHead``, so that denoising is compared with regression at equal heads.

    Our control, not the paper's: ROSS's denoising arm changes the objective and the head at once. A feed-forward ratio of 7 gives
    each block the 18 width^2 weights that a modulated block has (4 + 8 + 6).

    Shape:
        ``[B, grid*grid, condition_dim]`` -> ``[B, channels, grid, grid]``.

    Raises:
        ValueError: ``heads`` or 4 does not divide ``width``, or the condition has another shape than stated.
    """

    positions: Tensor

    def __init__(
        self, condition_dim: Count, grid: Count, channels: Count = 64, width: Count = 1024, depth: Count = 3, heads: Count = 16
    ) -> None:
        super().__init__()
        self.condition_dim, self.grid, self.channels = condition_dim, grid, channels
        self.condition_in = nn.Linear(condition_dim, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, ratio=7) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, channels)
        self.register_buffer("positions", position_table(grid, width).to(torch.get_default_dtype())[None])
        xavier_linears(self)

    def regress(self, states: Tensor) -> Tensor:
        """All tokens see each other."""
        if states.shape[1:] != (self.grid**2, self.condition_dim):
            expected = ["B", self.grid**2, self.condition_dim]
            raise ValueError(f"AttentionRegressionHead.condition: found {list(states.shape)}, expected {expected}")
        x = self.condition_in(states) + self.positions  # [B, N, width]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))
