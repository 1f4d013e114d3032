"""Who turns query tokens into states: the layers that run over them while they read what the frozen model made of the prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from umm_zoo.backbones.loading import torch_dtype
from umm_zoo.backbones.prefix import LanguageStack, Prefix, PrefixBackbone
from umm_zoo.batch import Grid


class QueryPathway(nn.Module, ABC):
    """Runs ``[detail tokens | queries]`` behind a prompt that the frozen model has read once.

    Prompt tokens never attend to these, so the prompt's keys and values are constants here: nothing is stored for its backward
    pass, and what the frozen model says stays the same bit for bit. A subclass implements ``attach``, which the method calls with
    its backbone (two nodes of an experiment file cannot share an object), and may change ``among`` and ``positions``.

    Shape:
        - tokens: ``[B, K + N, D]``; positions: ``[3, B, K + N]``
        - mask: ``[B, K + N, K + N]`` bool, True where the row may attend to the column
        - output: ``[B, K + N, D]``

    Args:
        bidirectional: queries attend to each other; otherwise each to itself and those before it.
        grid_positions: queries are placed like the tokens of one more image; otherwise like the words of a text.
        gradient_checkpointing: compute the layers again in the backward pass instead of storing what they made.
    """

    def __init__(self, bidirectional: bool, grid_positions: bool, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.bidirectional, self.grid_positions = bidirectional, grid_positions
        self.gradient_checkpointing = gradient_checkpointing

    @abstractmethod
    def attach(self, vlm: PrefixBackbone) -> None:
        """Take what is needed of the backbone, before any of it is frozen; called once."""

    @property
    @abstractmethod
    def stack(self) -> LanguageStack:
        """The layers that are run.

        Raises:
            RuntimeError: ``attach`` has not been called.
        """

    def among(self, num_queries: int, device: torch.device | None = None) -> Tensor:
        """Which queries may attend to which, ``[N, N]`` bool."""
        ones = torch.ones(num_queries, num_queries, dtype=torch.bool, device=device)
        return ones if self.bidirectional else ones.tril()

    def positions(self, vlm: PrefixBackbone, prefix: Prefix, grid: Grid) -> Tensor:
        """Position ids of the queries, ``[3, B, h*w]``."""
        return vlm.grid_positions(prefix, grid) if self.grid_positions else vlm.text_positions(prefix, grid.num_cells)

    def forward(self, tokens: Tensor, prefix: Prefix, positions: Tensor, mask: Tensor) -> Tensor:
        """Run the layers."""
        return self.stack(tokens, prefix, positions, mask, self.gradient_checkpointing)

    def attention(self, tokens: Tensor, prefix: Prefix, positions: Tensor, mask: Tensor) -> Iterator[Tensor]:
        """Attention weights layer after layer, ``[B, heads, K + N, L + K + N]``; no gradient."""
        return self.stack.attention(tokens, prefix, positions, mask)

    def example_inputs(self) -> tuple[Tensor, Prefix, Tensor, Tensor]:
        """Five tokens behind a random prompt of four, for ``umm_zoo.testing.check_block``."""
        positions = torch.arange(4, 9).expand(3, 2, 5)
        return torch.randn(2, 5, self.stack.width), self.stack.example_prefix(2, 4), positions, self.among(5).expand(2, -1, -1)


class ExpertPathway(QueryPathway):
    """A trainable copy of the language model's layers, norms and all, that reads the frozen one's keys and values.

    WeMMU (a mixture of transformers, after Bagel): queries see everything and each other, prompt tokens keep their causal pattern.
    The token embeddings are left out of the copy, nothing would ever train them. At the start it is the language model itself:
    text embeddings under a causal mask come out as from the frozen model. Size check: 36 copied layers of Qwen2.5-3B are 2.78 B
    parameters, which with the other parts makes the 8 B that the paper's tables give.

    Reference: Yang et al., "WeMMU" (arXiv 2512.02536); Deng et al., "Bagel" (arXiv 2505.14683).

    Shape:
        See ``QueryPathway``.

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
        self.expert: LanguageStack | None = None

    def attach(self, vlm: PrefixBackbone) -> None:
        """Copy."""
        self.expert = vlm.language_stack(copied=True).to(self.dtype)

    @property
    def stack(self) -> LanguageStack:
        """The copy."""
        if self.expert is None:
            raise RuntimeError("ExpertPathway: attach(vlm) must come before the first use")
        return self.expert


class FrozenPathway(QueryPathway):
    """The frozen language model itself, run causally on the queries, which are placed as the next words of the text.

    MetaQuery and OpenUni. Gradients flow through it to the queries and change nothing in it. It holds no parameter of its own: the
    layers stay the backbone's.

    Reference: Pan et al., "Transfer between Modalities with MetaQueries" (arXiv 2504.06256).

    Shape:
        See ``QueryPathway``.

    Args:
        bidirectional, grid_positions, gradient_checkpointing: see ``QueryPathway``.
    """

    def __init__(self, bidirectional: bool = False, grid_positions: bool = False, gradient_checkpointing: bool = False) -> None:
        super().__init__(bidirectional, grid_positions, gradient_checkpointing)
        self._borrowed: tuple[LanguageStack, ...] = ()  # in a tuple: registered, every tensor would stand twice in checkpoints

    def attach(self, vlm: PrefixBackbone) -> None:
        """Borrow."""
        self._borrowed = (vlm.language_stack(copied=False),)

    @property
    def stack(self) -> LanguageStack:
        """The backbone's own layers."""
        if not self._borrowed:
            raise RuntimeError("FrozenPathway: attach(vlm) must come before the first use")
        return self._borrowed[0]
