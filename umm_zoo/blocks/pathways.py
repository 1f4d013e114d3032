"""Query pathways: layers that turn query tokens into states, attending to the frozen model's keys and values of the prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from umm_zoo.backbones.by_shape import diagonal, triangle
from umm_zoo.backbones.loading import torch_dtype
from umm_zoo.backbones.prefix import LanguageStack, Prefix, PrefixBackbone
from umm_zoo.batch import Grid, regroup
from umm_zoo.blocks.details import Details, row_numbers

#: Share of padding from which on a second call of the layers is worth it (our choice).
_WORTH = 0.1


class QueryPathway(nn.Module, ABC):
    """Layers that run over ``[detail tokens | queries]`` behind a prompt that the frozen model has encoded once.

    It decides where these stand and which attends to which: all to the whole prompt; detail tokens to their own image and to those
    before it, and to no query; queries to every detail token, and to each other as ``among`` says. Prompt tokens never attend to
    them, so the prompt's keys and values are constants here: nothing is stored for its backward pass, and what the frozen model
    says stays the same bit for bit. A subclass implements ``attach``, which the method calls with its backbone (two nodes of an
    experiment file cannot share an object), and may change ``among`` and ``positions``.

    Shape:
        - prefix: of B prompts; details: K tokens per row, or None
        - queries: ``[B, M + N, D]``, N = h*w on ``grid`` behind M markers (mostly none), which are placed like the words of a text
        - output: ``[B, N, D]``, states of the queries after the final norm

    Args:
        bidirectional: queries attend to each other; otherwise each to itself and those before it.
        grid_positions: queries are placed like the tokens of one more image; otherwise like the words of a text.
        gradient_checkpointing: compute the layers again in the backward pass instead of storing what they made.
    """

    def __init__(self, bidirectional: bool, grid_positions: bool, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.bidirectional, self.grid_positions = bidirectional, grid_positions
        self.gradient_checkpointing = gradient_checkpointing
        self._stack: tuple[LanguageStack, ...] = ()  # in a tuple: registered, a borrowed tensor would stand twice in checkpoints

    @abstractmethod
    def attach(self, vlm: PrefixBackbone) -> None:
        """Take what is needed of the backbone as the stack, before any of it is frozen; called once."""

    @property
    def stack(self) -> LanguageStack:
        """The layers that are run.

        Raises:
            RuntimeError: ``attach`` has not been called.
        """
        if not self._stack:
            raise RuntimeError(f"{type(self).__name__}: attach(vlm) must come before the first use")
        return self._stack[0]

    def among(self, num_queries: int, device: torch.device | None = None) -> Tensor | None:
        """Which queries may attend to which, ``[N, N]`` bool; None where each may attend to all."""
        return None if self.bidirectional else triangle(torch.device(device or "cpu"), num_queries)

    def positions(self, prefix: Prefix, grid: Grid) -> Tensor:
        """Position ids of the queries, ``[3, B, h*w]``."""
        return prefix.grid_positions(grid) if self.grid_positions else prefix.text_positions(grid.num_cells)

    def forward(self, prefix: Prefix, details: Details | None, queries: Tensor, grid: Grid) -> Tensor:
        """Run the layers; on rows with and without detail tokens apart, where that saves enough padding."""
        if details is None or details.lengths is None:  # of no rank: there is no branch that makes any
            return self._run(prefix, details, queries, grid)
        groups = regroup.get()([(rows, queries[:, 0]) for rows in apart(details.lengths, queries.shape[1])])
        if len(groups) == 1:
            return self._run(prefix, details, queries, grid)
        made, unused = [], queries.new_zeros(())
        for rows, _ in groups:
            own = row_numbers(rows or [0], queries.device)
            states = self._run(prefix.select(own), details.select(rows or [0]), queries[own], grid)
            if rows:
                made.append(states)
            else:  # a stand-in, so that all ranks call the layers equally often
                unused = unused + 0 * states.sum()
        order = [row for rows, _ in groups for row in rows]
        places = row_numbers(sorted(range(len(order)), key=order.__getitem__), queries.device)
        return torch.cat(made)[places] + unused

    def _run(self, prefix: Prefix, details: Details | None, queries: Tensor, grid: Grid) -> Tensor:
        tokens, positions, mask = self.arrange(prefix, details, queries, grid)
        states = self.stack(tokens, prefix, positions, mask, self.gradient_checkpointing)
        return states[:, tokens.shape[1] - grid.num_cells :]

    def attention(self, prefix: Prefix, details: Details | None, queries: Tensor, grid: Grid) -> Iterator[Tensor]:
        """Attention that queries pay, layer after layer, ``[B, heads, N, L + K + M + N]``; no gradient."""
        tokens, positions, mask = self.arrange(prefix, details, queries, grid)
        for weights in self.stack.attention(tokens, prefix, positions, mask):
            yield weights[:, :, tokens.shape[1] - grid.num_cells :]

    def arrange(self, prefix: Prefix, details: Details | None, queries: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
        """``[details | markers | queries]``, their position ids, and which may attend to which.

        Returns:
            tokens ``[B, K+M+N, D]``, positions ``[3, B, K+M+N]``, mask ``[B, K+M+N, K+M+N]`` bool or None: all to all.
        """
        size, count = queries.shape[:2]
        markers = count - grid.num_cells
        behind = replace(prefix, next_position=prefix.next_position + markers)
        details = details or Details.none(queries)
        if details.unused is not None:
            queries = queries + details.unused.to(queries.dtype)
        dtype = torch.promote_types(details.tokens.dtype, queries.dtype)
        tokens = torch.cat([details.tokens.to(dtype), queries.to(dtype)], dim=1)
        places = details.positions, prefix.text_positions(markers), self.positions(behind, grid)
        positions = torch.cat(places, dim=-1)
        among = self.among(count, queries.device)
        if among is None and not details.count:
            return tokens, positions, None
        images, real = details.images, details.mask
        inside = (images[:, :, None] >= images[:, None]) & real[:, None]  # [B, K, K]
        inside |= diagonal(inside.device, details.count)  # padding sees something, itself
        upper = torch.cat([inside, inside.new_zeros(size, details.count, count)], dim=-1)
        among = inside.new_ones(count, count) if among is None else among
        lower = torch.cat([real[:, None].expand(-1, count, -1), among.expand(size, -1, -1)], dim=-1)
        return tokens, positions, torch.cat([upper, lower], dim=1)

    def example_inputs(self) -> tuple[Prefix, Details, Tensor, Grid]:
        """Two detail tokens and six queries behind a random prompt of four, for ``umm_zoo.testing.check_block``."""
        width, positions = self.stack.width, torch.tensor([1, 2]).expand(3, 2, 2)
        details = Details(torch.randn(2, 2, width), positions, torch.tensor([[0, 0], [0, -1]]))
        return self.stack.example_prefix(2, 4), details, torch.randn(2, 6, width), Grid(2, 3)


def apart(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Rows that are run together: those without detail tokens for themselves if their padding is a good part of all.

    Args:
        lengths: number of detail tokens of each row.
        count: queries of each row.
    """
    rows = list(range(len(lengths)))
    bare = [row for row in rows if not lengths[row]]
    padding, whole = len(bare) * max(lengths), len(rows) * (max(lengths) + count)
    if len(bare) == len(rows) or padding < _WORTH * whole:
        return [rows]
    return [bare, [row for row in rows if lengths[row]]]


class ExpertPathway(QueryPathway):
    """A trainable copy of the language model's layers, norms and all, that attends to the frozen one's keys and values.

    WeMMU (a mixture of transformers, after Bagel): queries see everything and each other, prompt tokens keep their causal pattern.
    The token embeddings are left out of the copy, nothing would ever train them. At the start it is the language model itself:
    text embeddings under a causal mask come out as from the frozen model. Size check: 36 copied layers of Qwen2.5-3B are 2.78 B
    parameters, which with the other parts makes the 8 B that the paper's tables give.

    Reference: Yang et al., "WeMMU" (arXiv 2512.02536); Deng et al., "Bagel" (arXiv 2505.14683).

    Args:
        bidirectional, grid_positions, gradient_checkpointing: see ``QueryPathway``.
        dtype: of the copy, such as ``float32`` beside a frozen model in bfloat16; None is the model's own.

    Raises:
        ValueError: no such dtype.
    """

    def __init__(
        self,
        bidirectional: bool = True,
        grid_positions: bool = True,
        gradient_checkpointing: bool = False,
        dtype: str | None = None,
    ) -> None:
        super().__init__(bidirectional, grid_positions, gradient_checkpointing)
        self.dtype = None if dtype is None else torch_dtype(dtype)

    def attach(self, vlm: PrefixBackbone) -> None:
        """Copy."""
        self.expert = vlm.language_stack(copied=True).to(self.dtype)
        self._stack = (self.expert,)


class FrozenPathway(QueryPathway):
    """The frozen language model itself, run causally on the queries, which are placed as the next words of the text.

    MetaQuery and OpenUni. Gradients flow through it to the queries and change nothing in it. It holds no parameter of its own: the
    layers stay the backbone's.

    Reference: Pan et al., "Transfer between Modalities with MetaQueries" (arXiv 2504.06256).

    Args:
        bidirectional, grid_positions, gradient_checkpointing: see ``QueryPathway``.
    """

    def __init__(self, bidirectional: bool = False, grid_positions: bool = False, gradient_checkpointing: bool = False) -> None:
        super().__init__(bidirectional, grid_positions, gradient_checkpointing)

    def attach(self, vlm: PrefixBackbone) -> None:
        """Borrow."""
        self._stack = (vlm.language_stack(copied=False),)
