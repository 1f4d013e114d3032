"""Heads over the several codes of one image token, one code after the other, and what such a token is to the language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.blocks.quantizers.base import MOST_BITS
from umm_zoo.blocks.transformer import PlainBlock
from umm_zoo.errors import Count, several

#: Score of what cannot be: finite in every precision, so that guidance takes no infinity from infinity.
_NO_CHANCE = -1e4


class CodeEmbeddings(nn.Module):
    """Sum of an embedding of each of the D codes of a token: residual codes add up too (our choice for other kinds).

    Shape:
        ``[..., D]`` long to ``[..., dim]``; of the first d codes alone where there are no more

    Args:
        sizes: numbers of codes K_1 to K_D.
        dim: width.
    """

    def __init__(self, sizes: Sequence[Count], dim: Count) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, dim) for size in sizes)

    def forward(self, codes: Tensor) -> Tensor:
        """Embed."""
        return torch.stack([table(codes[..., place]) for place, table in enumerate(self.tables) if place < codes.shape[-1]]).sum(0)


class CodeHead(nn.Module, ABC):
    """Head over the D codes of an image token, whose chance is that of the first code times that of the second given it, and so on.

    Shape:
        - forward: states ``[M, dim]`` of the language model and codes ``[M, D]`` -> logits ``[M, D, K]``, where those of a code
          depend on the codes before it alone; K is the largest of ``sizes``, and what is beyond a code's own size has no chance
        - next: states ``[M, dim]`` and the first d < D codes ``[M, d]`` -> logits ``[M, K]`` of the one that follows

    Args:
        dim: width of the language model.
        sizes: numbers of codes K_1 to K_D, see ``TokenCodec.code_sizes``.

    Raises:
        ValueError: no sizes.
    """

    def __init__(self, dim: Count, sizes: Sequence[Count]) -> None:
        super().__init__()
        several("sizes", sizes, int)
        if not sizes:
            raise ValueError(f"{type(self).__name__}.sizes: found none, expected the codec's")
        self.dim, self.sizes = dim, tuple(sizes)
        beyond = [[number >= size for number in range(max(sizes))] for size in sizes]
        self.register_buffer("beyond", torch.tensor(beyond), persistent=False)

    @abstractmethod
    def scores(self, states: Tensor, codes: Tensor) -> Tensor:
        """Scores of the first d + 1 codes given the first d, ``[M, d]``, as ``[M, d + 1, K]``."""

    def forward(self, states: Tensor, codes: Tensor) -> Tensor:
        """Logits of all codes, each given those before it."""
        return self._possible(self.scores(states, codes[:, :-1]))

    def next(self, states: Tensor, codes: Tensor) -> Tensor:
        """Logits of the code that follows."""
        return self._possible(self.scores(states, codes))[:, -1]

    def _possible(self, scores: Tensor) -> Tensor:
        beyond: Tensor = self.get_buffer("beyond")[: scores.shape[1]]
        return scores.masked_fill(beyond, _NO_CHANCE)

    def example_inputs(self) -> tuple[Tensor, Tensor]:
        """States and codes for ``umm_zoo.testing.check_block``."""
        return torch.randn(6, self.dim), torch.stack([torch.randint(size, (6,)) for size in self.sizes], dim=1)


class SoftmaxHead(CodeHead):
    """A linear layer over each code; the second and later ones see those before by an embedding that is added to the state.

    For one code per token it is the usual head.

    Args:
        dim, sizes: see ``CodeHead``.
    """

    def __init__(self, dim: Count, sizes: Sequence[Count]) -> None:
        super().__init__(dim, sizes)
        self.seen = CodeEmbeddings(sizes[:-1], dim)
        self.out = nn.ModuleList(nn.Linear(dim, max(sizes)) for _ in sizes)

    def scores(self, states: Tensor, codes: Tensor) -> Tensor:
        """See the base class."""
        known = [states if place == 0 else states + self.seen(codes[:, :place]) for place in range(codes.shape[1] + 1)]
        return torch.stack([out(state) for out, state in zip(self.out, known, strict=False)], dim=1)


class GroupHead(CodeHead):
    """Groups of bits in order, each a code: QLIP's 28 bits are two groups of 14 (the paper leaves the head open; our choice).

    A group is scored by a two-layer network of the state and of the *bits* of the groups before it, so that nothing is a table but
    the last layer.

    Args:
        dim: width of the language model.
        bits: of a token.
        group_bits: most bits of a group, at most 16; groups are as ``BinaryQuantizer(code_bits=...)`` makes them.

    Raises:
        ValueError: groups of too many bits.
    """

    def __init__(self, dim: Count, bits: Count, group_bits: Count = 14) -> None:
        if group_bits > MOST_BITS:
            raise ValueError(f"GroupHead.group_bits: found {group_bits}, expected at most {MOST_BITS}")
        groups = -(-bits // group_bits)
        self.bits = [bits // groups + (place < bits % groups) for place in range(groups)]
        super().__init__(dim, [2**count for count in self.bits])
        self.seen = nn.Linear(bits - self.bits[-1], dim, bias=False) if groups > 1 else None
        self.wide = nn.ModuleList(nn.Linear(dim, dim) for _ in range(groups))
        self.out = nn.ModuleList(nn.Linear(dim, max(self.sizes)) for _ in range(groups))

    def scores(self, states: Tensor, codes: Tensor) -> Tensor:
        """See the base class."""
        found = []
        for place in range(codes.shape[1] + 1):
            state = states if place == 0 or self.seen is None else states + self.seen(self._signs(codes[:, :place], states))
            found.append(self.out[place](F.gelu(self.wide[place](state))))
        return torch.stack(found, dim=1)

    def _signs(self, codes: Tensor, like: Tensor) -> Tensor:
        """Bits of the groups as -1 and 1, and 0 of groups to come, ``[M, bits - last group's]``."""
        width = sum(self.bits[:-1])
        bits = [codes[:, place, None] >> torch.arange(self.bits[place], device=codes.device) & 1 for place in range(codes.shape[1])]
        signs = torch.cat(bits, dim=1).to(like.dtype) * 2 - 1
        return F.pad(signs, (0, width - signs.shape[1]))


class DepthHead(CodeHead):
    """A small causal transformer over the codes of a token, as DualToken has it (3 layers) from RQ-Transformer.

    Reference: Lee et al., 2022, arXiv 2203.01941; Song et al., 2025, arXiv 2503.14324.

    Its first input is the language model's state, the d-th the sum of the embeddings of the first d - 1 codes; a learned
    position is added to each (our choice).

    Args:
        dim, sizes: see ``CodeHead``.
        layers: 3 in DualToken.
        heads: of the attention.
        width: of the transformer; None is ``dim``.
    """

    def __init__(self, dim: Count, sizes: Sequence[Count], layers: Count = 3, heads: Count = 8, width: Count | None = None) -> None:
        super().__init__(dim, sizes)
        width = width or dim
        self.enter = nn.Linear(dim, width)
        self.seen = CodeEmbeddings(sizes[:-1], width)
        self.positions = nn.Parameter(torch.randn(len(sizes), width) * 0.02)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, ratio=4, causal=True) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, max(sizes))

    def scores(self, states: Tensor, codes: Tensor) -> Tensor:
        """See the base class."""
        sums = [self.enter(states), *(self.seen(codes[:, : place + 1]) for place in range(codes.shape[1]))]
        hidden = torch.stack(sums, dim=1) + self.positions[: len(sums)]
        for block in self.blocks:
            hidden = block(hidden)
        scores: Tensor = self.out(self.norm(hidden))
        return scores


def assert_head(head: CodeHead | None, sizes: Sequence[int], width: int) -> None:
    """Refuse a head that does not fit the codes of a codec, or codes that need one.

    Args:
        head: None is the library's.
        sizes: of the codec.
        width: of the language model.

    Raises:
        ValueError: says which.
    """
    if not sizes or not all(sizes):
        raise ValueError("codec: found one whose quantizer has no codes, expected codes to predict")
    if head is None and len(sizes) > 1:
        raise ValueError(f"head: found none for the {len(sizes)} codes of a token, expected a block of umm_zoo.blocks.code_heads")
    if head is not None and (head.sizes, head.dim) != (tuple(sizes), width):
        found = f"a {type(head).__name__} of width {head.dim} over codes {list(head.sizes)}"
        raise ValueError(f"head: found {found}, expected width {width} and the codec's {list(sizes)}")
