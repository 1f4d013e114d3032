"""The connector of MetaQuery's release, under the names of its tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.by_shape import by_shape
from umm_zoo.backbones.decoder_attention import with_shared_keys
from umm_zoo.batch import Grid, Tokens
from umm_zoo.blocks.connectors import Connector
from umm_zoo.errors import Count

#: Frequencies of rotary positions start at one and fall to nearly the inverse of this.
ROPE_BASE = 10_000.0


class MetaQueryConnector(Connector):
    """MetaQuery's connector: a bidirectional encoder of Qwen2's layers, then Linear, tanh-GELU, Linear, RMS norm.

    The encoder is pre-norm, of the language model's width, with rotary positions along the sequence and *behind* them an RMS norm
    of queries and keys, whose gains every head has for itself; a feed-forward gated by SiLU; and no norm at its end. Its matrices
    start at a deviation of .014, the last norm at the decoder's ``condition_rms`` (the release: the root of 5.5 for Sana, 1 for
    Stable Diffusion 1.5). The tensors have the names of the release: a model's ``connector.*`` fits as it is.

    Reference: Pan et al., "Transfer between Modalities with MetaQueries" (arXiv 2504.06256) and its code, commit 206f6de.

    Args:
        in_dim, out_dim: language-model and condition width.
        depth: of the encoder, 24 in the paper's large connector.
        heads: None is one for each full 64 channels, the release's; their size is ``in_dim // heads``.
        kv_heads: heads of keys and values; None is ``heads``, the release's.
        hidden_dim: of the feed-forward; None is four times ``in_dim``, the release's.

    Raises:
        ValueError: no head, heads of an odd size, or ``kv_heads`` that do not divide ``heads``.
    """

    def __init__(
        self,
        in_dim: Count,
        out_dim: Count,
        depth: Count = 24,
        heads: Count | None = None,
        kv_heads: Count | None = None,
        hidden_dim: Count | None = None,
    ) -> None:
        super().__init__()
        self.in_dim, self.out_dim = in_dim, out_dim
        heads = in_dim // 64 if heads is None else heads
        encoder = RotaryEncoder(in_dim, depth, heads, heads if kv_heads is None else kv_heads, hidden_dim or 4 * in_dim)
        ends = nn.Linear(in_dim, out_dim), nn.GELU(approximate="tanh"), nn.Linear(out_dim, out_dim), FinalNorm(out_dim, eps=1e-5)
        self.connector = nn.Sequential(encoder, *ends)

    def match_rms(self, rms: float) -> None:
        """See ``Connector.match_rms``."""
        nn.init.constant_(self.connector.get_parameter("4.weight"), rms)

    def forward(self, states: Tokens, grid: Grid) -> Tokens:
        """Encode, project, normalise."""
        encoder, *ends = self.connector
        x = encoder(states.values, states.mask)
        for layer in ends:
            x = layer(x)
        return Tokens(x, states.mask)


class RotaryEncoder(nn.Module):
    """Qwen2's layers without a causal mask and without a final norm; see ``MetaQueryConnector``.

    Shape:
        ``[B, N, width]`` and a mask ``[B, N]`` or None -> ``[B, N, width]``.

    Raises:
        ValueError: see ``MetaQueryConnector``.
    """

    def __init__(self, width: int, depth: int, heads: int, kv_heads: int, hidden_dim: int) -> None:
        super().__init__()
        if heads < 1 or (width // heads) % 2:
            size = f", which makes heads of {width // heads} channels" if heads > 0 else ""
            raise ValueError(
                f"heads: found {heads} for a width of {width}{size}, expected some of an even size for rotary positions"
            )
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads: found {kv_heads}, expected a divisor of heads, {heads}")
        self.head_dim = width // heads
        self.layers = nn.ModuleList(RotaryLayer(width, heads, kv_heads, hidden_dim) for _ in range(depth))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.014)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Layer after layer, with one table of rotations."""
        rotation = rotations(x.device, x.shape[1], self.head_dim, x.dtype)
        for layer in self.layers:
            x = layer(x, rotation, mask)
        return x


class RotaryLayer(nn.Module):
    """Pre-norm attention over all tokens and a gated feed-forward, under Qwen2's names."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.self_attn = RotaryAttention(width, heads, kv_heads)
        self.mlp = GatedMLP(width, hidden_dim)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width, eps=1e-6), RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Attention, then feed-forward."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class RotaryAttention(nn.Module):
    """Attention whose queries and keys are rotated, then normalised with gains of each head's own; no bias at the output."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.q_proj = nn.Linear(width, heads * self.size)
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * self.size) for _ in range(2))
        self.o_proj = nn.Linear(heads * self.size, width, bias=False)
        self.q_norm, self.k_norm = HeadNorm(heads, self.size), HeadNorm(kv_heads, self.size)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Attend; a mask ``[B, N]`` is False at tokens that nobody attends to."""
        q, k, v = (project(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(rotate(q, *rotation)), self.k_norm(rotate(k, *rotation))  # [B, heads, N, size]
        attended = with_shared_keys(q, k, v, None if mask is None else mask[:, None, None])
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out


@by_shape
def rotations(count: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[N, size / 2]`` of the angles of N places, in float32 whatever they are rounded to then."""
    powers = torch.arange(0, size, 2, dtype=torch.float32) / size
    angles = torch.arange(count, dtype=torch.float32)[:, None] * (1 / ROPE_BASE**powers)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel i and channel i + size / 2 of ``[B, heads, N, size]`` as a plane, turned by the angle of their place."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class HeadNorm(nn.Module):
    """A vector of every head to unit length, times the root of its size, times gains of the head's own."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[B, heads, N, size]``."""
        return F.normalize(x, dim=-1) * self.gamma * x.shape[-1] ** 0.5


class RMSNorm(nn.Module):
    """Qwen2's RMS norm: computed in float32 at least and rounded to the input's dtype *before* the gains.

    ``nn.RMSNorm`` rounds behind them: other numbers in bfloat16.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def normalised(self, x: Tensor) -> Tensor:
        """The last axis without the gains."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        if x.dtype == self.weight.dtype and x.dtype not in (torch.bfloat16, torch.float16):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # the same numbers in one kernel
        return self.weight * self.normalised(x).to(x.dtype)


class FinalNorm(RMSNorm):
    """Diffusers' RMS norm, rounded to the dtype of the gains: under autocast the condition leaves in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        if self.weight.dtype == torch.float32:
            return super().forward(x.float())
        return self.weight * self.normalised(x).to(self.weight.dtype)


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))`` without biases."""

    def __init__(self, width: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden_dim, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every token alone."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
