"""Bottlenecks of visual tokenizers: wide tokens down to a few numbers, quantized, and up again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from umm_zoo.blocks.quantizers import Quantized, Quantizer
from umm_zoo.errors import Count


class Projection(nn.Module):
    """Base of maps of tokens from one width to another.

    Shape:
        ``[B, N, in_dim]`` -> ``[B, N, out_dim]``
    """

    in_dim: int
    out_dim: int

    def __init__(self, in_dim: Count, out_dim: Count) -> None:
        super().__init__()
        self.in_dim, self.out_dim = in_dim, out_dim

    def forward(self, tokens: Tensor) -> Tensor:
        """Map."""
        raise NotImplementedError

    def example_inputs(self) -> tuple[Tensor]:
        """Tokens for ``umm_zoo.testing.check_block``."""
        return (torch.randn(2, 6, self.in_dim),)


class IdentityProjection(Projection):
    """Tokens as they are: of representation autoencoders, whose latents are an encoder's features.

    Args:
        dim: width.
    """

    def __init__(self, dim: Count) -> None:
        super().__init__(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hand on."""
        return tokens


class LinearProjection(Projection):
    """One linear layer (VQRAE).

    Args:
        in_dim, out_dim: widths.
    """

    def __init__(self, in_dim: Count, out_dim: Count) -> None:
        super().__init__(in_dim, out_dim)
        self.linear = nn.Linear(in_dim, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map."""
        mapped: Tensor = self.linear(tokens)
        return mapped


class MLPProjection(Projection):
    """Linear, GELU, Linear, as wide inside as the wider side (QLIP: Zhao et al., 2025, arXiv 2502.05178, section 4).

    Args:
        in_dim, out_dim: widths.
    """

    def __init__(self, in_dim: Count, out_dim: Count) -> None:
        super().__init__(in_dim, out_dim)
        self.wide, self.out = nn.Linear(in_dim, max(in_dim, out_dim)), nn.Linear(max(in_dim, out_dim), out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map."""
        mapped: Tensor = self.out(F.gelu(self.wide(tokens)))
        return mapped


class AttentionProjection(Projection):
    """Attention whose heads are as wide as the narrow side, then a gated feed-forward (DualToken's release).

    ``x = P norm(tokens) + heads``: on the way down the heads are averaged, on the way up they stand beside each other.

    Reference: Song et al., 2025, arXiv 2503.14324, and its release.

    Args:
        in_dim, out_dim: widths, one a multiple of the other.
        causal: a token sees those before it, in raster order, alone: what its release does behind the quantizer.

    Raises:
        ValueError: neither width is a multiple of the other.
    """

    def __init__(self, in_dim: Count, out_dim: Count, causal: bool = False) -> None:
        super().__init__(in_dim, out_dim)
        narrow, wide = sorted((in_dim, out_dim))
        if wide % narrow:
            raise ValueError(f"AttentionProjection: found widths {in_dim} and {out_dim}, expected one a multiple of the other")
        self.heads, self.causal = wide // narrow, causal
        self.norm = nn.LayerNorm(in_dim)
        self.qkv, self.direct = nn.Linear(in_dim, 3 * wide), nn.Linear(in_dim, out_dim)
        self.norm2, self.gated, self.out = nn.LayerNorm(out_dim), nn.Linear(out_dim, 8 * out_dim), nn.Linear(4 * out_dim, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map."""
        normed = self.norm(tokens)
        q, k, v = rearrange(self.qkv(normed), "B N (three heads size) -> three B heads N size", three=3, heads=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        heads = attended.mean(dim=1) if self.out_dim < self.in_dim else rearrange(attended, "B heads N size -> B N (heads size)")
        mapped: Tensor = self.direct(normed) + heads
        value, gate = self.gated(self.norm2(mapped)).chunk(2, dim=-1)
        mapped = mapped + self.out(value * F.gelu(gate))
        return mapped


@dataclass
class Squeezed:
    """What a bottleneck makes of tokens.

    Shape:
        - tokens: ``[B, N, out_dim]``
        - quantized: of ``[B, N, d]``
    """

    tokens: Tensor
    quantized: Quantized


class Bottleneck(nn.Module):
    """A projection down, a quantizer, a projection up.

    Shape:
        ``[B, N, in_dim]`` -> ``Squeezed``

    Args:
        down: to the quantizer's width.
        quantizer: of the narrow latents.
        up: from there to what the decoder reads.

    Raises:
        ValueError: widths that do not fit.
    """

    def __init__(self, down: Projection, quantizer: Quantizer, up: Projection) -> None:
        super().__init__()
        if not down.out_dim == quantizer.dim == up.in_dim:
            found = f"down to {down.out_dim}, a quantizer of {quantizer.dim}, up from {up.in_dim}"
            raise ValueError(f"Bottleneck: found {found}, expected one width")
        self.down, self.quantizer, self.up = down, quantizer, up

    def forward(self, tokens: Tensor) -> Squeezed:
        """Through the quantizer."""
        quantized = self.quantizer(self.down(tokens))
        return Squeezed(self.up(quantized.embeddings), quantized)

    def tokens_of(self, codes: Tensor) -> Tensor:
        """What the decoder reads for codes ``[B, N, D]``."""
        tokens: Tensor = self.up(self.quantizer.values_of(codes))
        return tokens
