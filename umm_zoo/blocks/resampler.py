"""Perceiver resampler: a fixed number of tokens from any number of them."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.errors import Count


class PerceiverResampler(nn.Module):
    """Learned queries that attend, layer after layer, to tokens and to themselves, and come out as so many tokens of another width.

    With the defaults that of Forge-and-Quench's release, which takes its weights by name (``faq_proj_model``); it is Flamingo's
    (Alayrac et al., 2022, arXiv 2204.14198) with keys of tokens and queries side by side, as in IP-Adapter Plus.

    Reference: "Forge-and-Quench" (arXiv 2601.04706) and its released code.

    Args:
        in_dim: D, of the tokens; 1152, SigLIP's, in the release.
        out_dim: E, of what comes out: the decoder's condition width there.
        hidden_dim: between them; None is ``out_dim``.
        num_queries: 16 in the release.
        depth: layers; 4 there.
        num_heads, head_dim: of the attention; 16 and 64 there.

    Shape:
        tokens ``[B, N, D]`` -> ``[B, num_queries, E]``
    """

    def __init__(
        self,
        in_dim: Count,
        out_dim: Count,
        hidden_dim: Count | None = None,
        num_queries: Count = 16,
        depth: Count = 4,
        num_heads: Count = 16,
        head_dim: Count = 64,
    ) -> None:
        super().__init__()
        width = hidden_dim or out_dim
        self.in_dim, self.out_dim = in_dim, out_dim
        self.latents = nn.Parameter(torch.randn(1, num_queries, width) / width**0.5)
        self.proj_in, self.proj_out, self.norm_out = nn.Linear(in_dim, width), nn.Linear(width, out_dim), nn.LayerNorm(out_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([_Attention(width, num_heads, head_dim), _feed_forward(width)]) for _ in range(depth)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Resample."""
        tokens, queries = self.proj_in(tokens), self.latents.expand(len(tokens), -1, -1)
        for layer in self.layers:
            attention, feed_forward = cast(nn.ModuleList, layer)
            queries = queries + attention(tokens, queries)
            queries = queries + feed_forward(queries)
        out: Tensor = self.norm_out(self.proj_out(queries))
        return out


class _Attention(nn.Module):
    """Attention of queries to tokens and queries."""

    def __init__(self, width: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, num_heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * num_heads * head_dim, bias=False)
        self.to_out = nn.Linear(num_heads * head_dim, width, bias=False)

    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        queries = self.norm2(queries)
        keys, values = self.to_kv(torch.cat([self.norm1(tokens), queries], dim=1)).chunk(2, dim=-1)
        parts = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.to_q(queries), keys, values))
        out: Tensor = self.to_out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return out


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
    )
