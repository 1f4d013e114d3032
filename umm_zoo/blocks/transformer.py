"""Pieces that several transformers share: embeddings of time and place, attention, feed-forward, layers, token grids."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from umm_zoo.backbones.by_shape import by_shape


def time_embedding(time: Tensor, size: int) -> Tensor:
    """Sinusoids of the time as it is given, cosines first: ``[cos(t f_k), sin(t f_k)]`` with ``f_k = 10000^(-k / half)``.

    Args:
        time: ``[B]``.
        size: width of the embedding; an odd size ends in a zero.

    Returns:
        ``[B, size]`` in float32, or float64 where ``time`` is.
    """
    half = size // 2
    dtype = time.dtype if time.dtype == torch.float64 else torch.float32
    angles = time.to(dtype)[:, None] * _frequencies(time.device, half, dtype)  # [B, half]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, size % 2))


@by_shape
def _frequencies(count: int, dtype: torch.dtype) -> Tensor:
    return torch.exp(-math.log(10000) * torch.arange(count, dtype=dtype) / count)


def position_table(grid: int, width: int) -> Tensor:
    """Two-dimensional sine-cosine positions in raster order, the column in the first half, the row in the second.

    With ``width / 4`` frequencies f_j = 10000^(-j / (width / 4)) the token at row r and column q gets
    ``[sin(q f), cos(q f), sin(r f), cos(r f)]``: sines first, unlike ``time_embedding``.

    Returns:
        ``[grid * grid, width]`` in float64.

    Raises:
        ValueError: the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width: found {width}, expected a multiple of 4 for two-dimensional positions")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # [grid, width / 4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [grid, width / 2]
    columns, rows = axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=-1)


def as_map(tokens: Tensor) -> Tensor:
    """Tokens of a square grid ``[B, N, C]`` in raster order -> ``[B, C, g, g]``.

    Raises:
        ValueError: N is not a square.
    """
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(f"tokens: found {tokens.shape[1]}, expected those of a square grid")
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def as_tokens(grid: Tensor) -> Tensor:
    """``[B, C, h, w]`` -> ``[B, h*w, C]`` in raster order."""
    return grid.flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """Self-attention over all tokens: one fused projection with bias, no norm on queries or keys, no dropout.

    Shape:
        ``[B, N, width]`` -> ``[B, N, width]``.

    Args:
        width, heads: sizes.
        causal: a token sees those before it and itself alone.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width: found {width}, expected a multiple of heads ({heads})")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        # rows of qkv: all queries, all keys, all values; head after head inside each
        q, k, v = rearrange(self.qkv(x), "B N (three heads size) -> three B heads N size", three=3, heads=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.out(rearrange(attended, "B heads N size -> B N (heads size)"))
        return out


class FeedForward(nn.Module):
    """Linear, tanh-approximated GELU, Linear.

    Shape:
        ``[B, N, width]`` -> ``[B, N, width]``.
    """

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        self.wide = nn.Linear(width, ratio * width)
        self.out = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every token alone."""
        return self.out(F.gelu(self.wide(x), approximate="tanh"))


class ModulatedBlock(nn.Module):
    """A transformer block whose norms and residual branches are shifted, scaled and gated by a condition (adaLN-zero).

    Reference: Peebles and Xie, 2023, arXiv 2212.09748, here with one condition per token.

    Shape:
        - x, condition: ``[B, N, width]``; the condition is taken after its SiLU
        - output: ``[B, N, width]``
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(width, heads)
        self.feed_forward = FeedForward(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Attention, then feed-forward, each with its own shift, scale and gate."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)  # each [B, N, width]
        x = x + gate1 * self.attention(self.norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.feed_forward(self.norm(x) * (1 + scale2) + shift2)


class PlainBlock(nn.Module):
    """A pre-norm transformer block without modulation.

    Shape:
        ``[B, N, width]`` -> ``[B, N, width]``.
    """

    def __init__(self, width: int, heads: int, ratio: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = SelfAttention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.feed_forward = FeedForward(width, ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then feed-forward."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


def xavier_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear inside ``module``."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
