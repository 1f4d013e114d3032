"""The connector of OpenUni's release, under the names of its tensors."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.batch import Grid, Tokens
from umm_zoo.blocks.connectors import Connector
from umm_zoo.blocks.transformer import xavier_linears
from umm_zoo.errors import Count


class OpenUniConnector(Connector):
    """OpenUni's connector: a bidirectional encoder of SigLIP's layers and a Linear to the condition.

    Pre-norm layers with LayerNorm, biases everywhere, a tanh-GELU feed-forward; no positions, no norm of queries and keys, none at
    the end, so that permuted tokens come out permuted. Attention and feed-forward start Xavier-uniform, each matrix for itself,
    with biases of zero, those of the feed-forward at a deviation of 1e-6. The tensors have the names of the release: a model's
    ``connector.*`` and ``projector.*`` fit as they are.

    The defaults are those of OpenUni-L (225.5 M parameters with an ``in_dim`` of 1536 and Sana); OpenUni-B has an ``in_dim`` of
    896, 14 heads and a ``hidden_dim`` of 3072.

    Reference: Wu et al., "OpenUni" (arXiv 2505.23661) and its code, commit d1703fc.

    Args:
        in_dim, out_dim: language-model and condition width.
        depth, heads: of the encoder.
        hidden_dim: of the feed-forward.
        proj_type: where the Linear stands: ``enc_proj`` behind the encoder, which has the language model's width; ``proj_enc``
            before it, the condition's; ``proj_enc_proj`` one on either side of an encoder of another ``width``.
        width: of the encoder, with ``proj_enc_proj`` only.

    Raises:
        ValueError: the heads do not divide the encoder's width; no such ``proj_type``; a ``width`` is missing or too much.
    """

    def __init__(
        self,
        in_dim: Count,
        out_dim: Count,
        depth: Count = 6,
        heads: Count = 24,
        hidden_dim: Count = 8960,
        proj_type: Literal["enc_proj", "proj_enc", "proj_enc_proj"] = "enc_proj",
        width: Count | None = None,
    ) -> None:
        super().__init__()
        self.in_dim, self.out_dim, self.proj_type = in_dim, out_dim, proj_type
        widths = {"enc_proj": in_dim, "proj_enc": out_dim, "proj_enc_proj": width}
        if proj_type not in widths:
            raise ValueError(f"proj_type: found '{proj_type}', expected {list(widths)}")
        own = widths[proj_type]
        if own is None or width not in (None, own):
            expected = "the encoder's width" if own is None else f"none, for the encoder has {own} with proj_type '{proj_type}'"
            raise ValueError(f"width: found {width}, expected {expected}")
        self.connector = PlainEncoder(own, depth, heads, hidden_dim)
        self.projector: nn.Module = nn.Linear(in_dim, out_dim)
        if proj_type == "proj_enc_proj":
            self.projector = nn.ModuleList([nn.Linear(in_dim, own), nn.Linear(own, out_dim)])

    def forward(self, states: Tokens, grid: Grid) -> Tokens:
        """Project and encode, in the order of ``proj_type``."""
        x, mask = states.values, states.mask
        if isinstance(self.projector, nn.ModuleList):
            before, behind = self.projector
            return Tokens(behind(self.connector(before(x), mask)), mask)
        if self.proj_type == "proj_enc":
            return Tokens(self.connector(self.projector(x), mask), mask)
        return Tokens(self.projector(self.connector(x, mask)), mask)


class PlainEncoder(nn.Module):
    """SigLIP's layers without its final norm; see ``OpenUniConnector``.

    Shape:
        ``[B, N, width]`` and a mask ``[B, N]`` or None -> ``[B, N, width]``.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, width: int, depth: int, heads: int, hidden_dim: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads: found {heads}, expected a divisor of the encoder's width, {width}")
        self.layers = nn.ModuleList(PlainLayer(width, heads, hidden_dim) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Layer after layer."""
        for layer in self.layers:
            x = layer(x, mask)
        return x


class PlainLayer(nn.Module):
    """Pre-norm attention over all tokens and a feed-forward, under SigLIP's names."""

    def __init__(self, width: int, heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.self_attn = PlainAttention(width, heads)
        self.mlp = PlainMLP(width, hidden_dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attention, then feed-forward."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class PlainAttention(nn.Module):
    """Attention with a bias in each of its four matrices."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        xavier_linears(self)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend; a mask ``[B, N]`` is False at tokens that nobody attends to."""
        q, k, v = (project(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        attended = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out


class PlainMLP(nn.Module):
    """Linear, tanh-GELU, Linear, with biases."""

    def __init__(self, width: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden_dim), nn.Linear(hidden_dim, width)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every token alone."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out
