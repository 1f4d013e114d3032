"""Masked autoencoder over continuous image tokens: an encoder that sees what is not hidden, a decoder that fills in the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from umm_zoo.backbones.by_shape import numbers
from umm_zoo.batch import Grid, Tokens
from umm_zoo.errors import Count, Natural, Share, UserError


@dataclass
class Encoded:
    """Buffers and visible tokens behind an encoder, S + V of them, the buffers first and the others in raster order.

    Shape:
        - values: ``[B, S + V, d]``, V being the largest number of visible tokens of a row.
        - mask: ``[B, S + V]`` bool, False where a row has fewer; None where all rows have V.
        - places: ``[B, V]``, of the visible tokens in their grid; behind them those of hidden ones.

    Attributes:
        num_buffers: S.
        grid: N cells.
    """

    values: Tensor
    mask: Tensor | None
    places: Tensor
    num_buffers: int
    grid: Grid

    @property
    def counted(self) -> Tensor:
        """``mask``, of all True where there is none."""
        return self.values.new_ones(self.values.shape[:2], dtype=torch.bool) if self.mask is None else self.mask


class MaskedAttention(nn.Module):
    """Bidirectional self-attention of one fused projection; keys may be masked. ``[B, N, width]`` -> the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise UserError("heads", f"{heads} heads for a width of {width}", "a divisor of the width")
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend to the keys where ``mask`` ``[B, N]`` is True."""
        q, k, v = rearrange(self.qkv(x), "B N (three heads size) -> three B heads N size", three=3, heads=self.heads)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None], dropout)
        return F.dropout(self.proj(rearrange(mixed, "B heads N size -> B N (heads size)")), self.dropout, self.training)


class MaskedMLP(nn.Module):
    """Linear, GELU, Linear at four times the width, with dropout behind both. ``[B, N, width]`` -> the same."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), dropout

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every token alone."""
        wide = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(wide), self.dropout, self.training)


class MaskedBlock(nn.Module):
    """Pre-norm layer of a vision transformer whose keys may be masked. ``[B, N, width]`` -> the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), MaskedAttention(width, heads, dropout)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), MaskedMLP(width, dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attention, then feed-forward."""
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class MaskedEncoder(nn.Module):
    """Transformer over buffers and those image tokens that are not hidden, which are left out as in a masked autoencoder.

    The encoder of MAR without its class embedding: all buffers start from one learned vector, as in Harmon (in MAR from that of the
    class), and differ by their positions. Names of tensors are those of MAR's release, see ``parts_of_mar``. A row may hide as many
    tokens as it likes.

    Reference: Li et al., "Autoregressive Image Generation without Vector Quantization" (arXiv 2406.11838), figure 5 and released
    code; Wu et al., "Harmonizing Visual Representations for Unified Multimodal Understanding and Generation" (arXiv 2503.21979).

    Shape:
        - tokens: ``[B, N, channels]``, N = h * w; hidden: ``[B, N]`` bool; grid: h and w, None for the built one
        - output: ``Encoded``

    Args:
        channels: of a token; 16 of MAR's codec.
        side: cells along one side of the grid that positions are built for; those of another grid are resized bilinearly.
        width, depth, heads: 768, 12, 12 in MAR-B; 1024, 16, 16 in MAR-L; 1280, 20, 16 in MAR-H.
        num_buffers: S; 64 in the paper.
        dropout: of attention and of what each branch gives.
    """

    def __init__(
        self,
        channels: Count = 16,
        side: Count = 16,
        width: Count = 768,
        depth: Count = 12,
        heads: Count = 12,
        num_buffers: Natural = 64,
        dropout: Share = 0.1,
    ) -> None:
        super().__init__()
        self.channels, self.side, self.width, self.num_buffers = channels, side, width, num_buffers
        self.z_proj, self.z_proj_ln = nn.Linear(channels, width), nn.LayerNorm(width, eps=1e-6)
        self.fake_latent = nn.Parameter(torch.empty(1, width))
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, num_buffers + side**2, width))
        self.encoder_blocks = nn.ModuleList(MaskedBlock(width, heads, dropout) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        initialize(self)

    def forward(self, tokens: Tensor, hidden: Tensor, grid: Grid | None = None) -> Encoded:
        """Encode what is visible."""
        grid, kept = grid or Grid(self.side, self.side), self.num_buffers
        order = hidden.to(torch.uint8).argsort(dim=1, stable=True)[:, : int((~hidden).sum(1).max())]  # visible ones first
        known, order = ~hidden.gather(1, order), order.to(tokens.device)  # [B, V]
        buffers = self.fake_latent.expand(len(tokens), kept, -1)
        x = torch.cat([buffers, self.z_proj(tokens.to(self.z_proj.weight.dtype))], dim=1)
        x = self.z_proj_ln(x + positions_of(self.encoder_pos_embed_learned, kept, self.side, grid))
        x = torch.cat([x[:, :kept], rows_at(x[:, kept:], order)], dim=1)
        mask = None if bool(known.all()) else F.pad(known, (kept, 0), value=True).to(tokens.device)
        for block in self.encoder_blocks:
            x = block(x, mask)
        return Encoded(self.encoder_norm(x), mask, order, kept, grid)


class MaskedDecoder(nn.Module):
    """Transformer that puts a learned vector in the place of each hidden token and gives a state of every token.

    MAR's, under the names of its release, see ``parts_of_mar`` and ``MaskedEncoder``.

    Shape:
        - encoded: ``Encoded`` of width ``encoder_width``; prompt: ``[B, L, D]``, which this decoder does not look at
        - output: ``[B, N, width]``

    Args:
        encoder_width: of the encoder.
        side: see ``MaskedEncoder``.
        width, depth, heads: as the encoder's in the releases.
        num_buffers: the encoder's.
        dropout: see ``MaskedEncoder``.

    Attributes:
        prompt_dim: width of the states of the prompt that it looks at, beside what the encoder's tokens have taken from them; None
            where it looks at none.
    """

    prompt_dim: int | None = None

    def __init__(
        self,
        encoder_width: Count = 768,
        side: Count = 16,
        width: Count = 768,
        depth: Count = 12,
        heads: Count = 12,
        num_buffers: Natural = 64,
        dropout: Share = 0.1,
    ) -> None:
        super().__init__()
        self.side, self.width, self.num_buffers = side, width, num_buffers
        self.decoder_embed, self.mask_token = nn.Linear(encoder_width, width), nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, num_buffers + side**2, width))
        self.decoder_blocks = nn.ModuleList(MaskedBlock(width, heads, dropout) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, side**2, width))
        initialize(self)

    def forward(self, encoded: Encoded, prompt: Tokens | None = None) -> Tensor:
        """The states of all tokens, in raster order."""
        kept, grid = encoded.num_buffers, encoded.grid
        known = self.decoder_embed(encoded.values)
        known = torch.where(encoded.counted[..., None], known, self.mask_token.to(known.dtype))
        whole = self.mask_token.to(known.dtype).expand(len(known), grid.num_cells, -1)
        filled = whole.scatter(1, encoded.places[..., None].expand(-1, -1, self.width), known[:, kept:])
        x = torch.cat([known[:, :kept], filled], dim=1)
        x = x + positions_of(self.decoder_pos_embed_learned, kept, self.side, grid)
        x = self.decoder_norm(self.mix(x, prompt))[:, kept:]
        return x + positions_of(self.diffusion_pos_embed_learned, 0, self.side, grid)

    def mix(self, x: Tensor, prompt: Tokens | None) -> Tensor:
        """Buffers and tokens ``[B, S + N, width]`` through the layers."""
        for block in self.decoder_blocks:
            x = block(x, None)
        return x


class PromptedDecoder(MaskedDecoder):
    """A ``MaskedDecoder`` whose tokens also attend to the language model's states of the prompt.

    Our control, of no release: where it follows a prompt and the plain decoder does not, the way through the encoder's tokens is
    too narrow; where neither does, something else is wrong.

    Args:
        prompt_dim: width of the language model.
        encoder_width, side, width, depth, heads, num_buffers, dropout: see ``MaskedDecoder``.
    """

    def __init__(
        self,
        prompt_dim: Count,
        encoder_width: Count = 768,
        side: Count = 16,
        width: Count = 768,
        depth: Count = 12,
        heads: Count = 12,
        num_buffers: Natural = 64,
        dropout: Share = 0.1,
    ) -> None:
        super().__init__(encoder_width, side, width, depth, heads=heads, num_buffers=num_buffers, dropout=dropout)
        self.prompt_dim, self.prompt_in = prompt_dim, nn.Linear(prompt_dim, width)

    def mix(self, x: Tensor, prompt: Tokens | None) -> Tensor:
        """The prompt's states stand behind the tokens."""
        if prompt is None:
            raise ValueError("PromptedDecoder: found no prompt, expected its states")
        own, count = self.prompt_in(prompt.values.to(x.dtype)), x.shape[1]
        mask = None if prompt.mask is None else F.pad(prompt.mask, (count, 0), value=True)
        x = torch.cat([x, own], dim=1)
        for block in self.decoder_blocks:
            x = block(x, mask)
        return x[:, :count]


def positions_of(table: Tensor, kept: int, side: int, grid: Grid) -> Tensor:
    """``[1, kept + h*w, D]`` of ``[1, kept + side*side, D]``: the first ``kept`` as they are, the others resized bilinearly."""
    if grid == (side, side):
        return table
    square = table[:, kept:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(square.float(), tuple(grid), mode="bilinear", align_corners=False).to(table.dtype)
    return torch.cat([table[:, :kept], resized.flatten(2).transpose(1, 2)], dim=1)


def rows_at(values: Tensor, places: Tensor) -> Tensor:
    """``[B, V, D]`` of ``[B, N, D]`` at places ``[B, V]``."""
    return values[numbers(values.device, len(values))[:, None], places]


def initialize(module: nn.Module) -> None:
    """MAR's: normal vectors of deviation .02, Xavier-uniform layers without bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter, std=0.02)


def parts_of_mar(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of MAR's release, by the part that takes them: ``encoder``, ``decoder`` and ``head`` (with ``learned_variance``).

    Its class embedding has no place; buffers start from the vector that stands for no class.

    Raises:
        UserError: these are no tensors of MAR.
    """
    own: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}, "head": {}}
    for name, value in state.items():
        if name.startswith("diffloss.net."):
            own["head"][name.removeprefix("diffloss.net.")] = value
        elif name.startswith(("decoder_", "mask_token", "diffusion_pos_embed")):
            own["decoder"][name] = value
        elif name.startswith(("encoder_", "z_proj", "fake_latent")):
            own["encoder"][name] = value
        elif name != "class_emb.weight":
            raise UserError("state", f"tensor '{name}'", "those of MAR's release (the map 'model_ema' of its checkpoint)")
    return own
