"""Query tokens of a bridge: what stands behind a prompt, one token for each place of the image to generate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from umm_zoo.batch import Grid, Tokens
from umm_zoo.blocks.positions import PositionEmbedding, centre
from umm_zoo.errors import Count, Natural


class QuerySampler(nn.Module, ABC):
    """Query tokens of a batch. A method calls it once per batch and shares the draw among its guidance branches.

    A subclass implements ``forward``; one with a count of its own overrides ``grid_for``.

    Attributes:
        width: language-model width D.
        random: whether two calls give two draws.

    Shape:
        - context: ``[B, L, D]``, the embedded prompts (the mask is False on padding), for queries that depend on the request
        - grid: of the image to generate, in cells of the latent
        - output: ``[B, N, D]`` in the context's dtype, N being the cells of ``grid_for(grid)``, in raster order

    Attributes:
        opening: text that ends the prompt, behind the opening of the answer.
    """

    width: int
    random: bool = False
    opening: str = ""

    def grid_for(self, grid: Grid) -> Grid:
        """The grid that the queries form for an image of ``grid``; the same one unless the count is fixed."""
        return grid

    @abstractmethod
    def forward(self, context: Tokens, grid: Grid, generator: torch.Generator | None = None) -> Tensor:
        """Make the queries; ``generator`` is the source of whatever is drawn."""

    def behind_marker(self, queries: Tensor) -> Tensor:
        """``[B, M + N, D]``: the queries behind M tokens that open an image, whose states nobody needs; 0 in most subclasses."""
        return queries

    def start_from(self, embeddings: Tensor) -> None:
        """Start from the language model's token embeddings ``[vocabulary, D]``, as some do; the method calls it once."""

    def example_inputs(self) -> tuple[Tokens, Grid]:
        """A small context and a grid that is not square, for ``umm_zoo.testing.check_block``."""
        return Tokens(torch.randn(2, 5, self.width), torch.ones(2, 5, dtype=torch.bool)), Grid(3, 4)


class NoisyQueries(QuerySampler):
    """Independent standard normal numbers, drawn again at every call; no parameters.

    WeMMU: the draw replaces a learned embedding, it does not perturb one. There is nothing per slot that could be learned; which
    place a query stands for it knows from its position alone. A learned scale per channel stayed at 1 and was dropped.

    Reference: Yang et al., "WeMMU" (arXiv 2512.02536); no public code.
    """

    random = True

    def __init__(self, width: Count) -> None:
        super().__init__()
        self.width = width

    def forward(self, context: Tokens, grid: Grid, generator: torch.Generator | None = None) -> Tensor:
        """Draw."""
        values = context.values
        shape = (len(values), grid.num_cells, self.width)
        # in float32 whatever the dtype: one seed is one draw
        return torch.randn(shape, generator=generator, device=values.device, dtype=torch.float32).to(values.dtype)


class LearnedQueries(QuerySampler):
    """A fixed number of learned embeddings, the same for every prompt and every size of image.

    OpenUni's, which uses 256 and starts them at a deviation of 1 / sqrt(width). Their grid is square where the number is, else one
    row.

    Reference: Wu et al., "OpenUni" (arXiv 2505.23661).

    Args:
        width: language-model width.
        num_queries: N.
    """

    def __init__(self, width: Count, num_queries: Count = 256) -> None:
        super().__init__()
        self.width, self.num_queries = width, num_queries
        self.table = nn.Parameter(torch.randn(num_queries, width) * width**-0.5)

    def grid_for(self, grid: Grid) -> Grid:
        """The queries' own grid, whatever the image's."""
        side = math.isqrt(self.num_queries)
        return Grid(side, side) if side * side == self.num_queries else Grid(1, self.num_queries)

    def forward(self, context: Tokens, grid: Grid, generator: torch.Generator | None = None) -> Tensor:
        """The table for every row."""
        return self.table.to(context.values.dtype).expand(len(context.values), -1, -1)


class MarkedQueries(LearnedQueries):
    """MetaQuery's queries: learned embeddings behind a line break and a learned marker, ``<begin_of_img>``.

    In the release they are new words of the frozen model, ``\\n<begin_of_img><img0><img1>...<end_of_img>`` behind the opening of
    the answer, and of its embedding matrix only the new rows are trained. They start where the library starts new words: at the
    mean of the old ones, with a billionth of their covariance. ``<end_of_img>`` stands behind the queries, where a causal model
    cannot see it, and is left out. 256 in the release's configurations (its code defaults to 64).

    Reference: Pan et al., "Transfer between Modalities with MetaQueries" (arXiv 2504.06256) and its code, commit 206f6de.

    Args:
        width: language-model width.
        num_queries: N.
    """

    opening = "\n"

    def __init__(self, width: Count, num_queries: Count = 256) -> None:
        super().__init__(width, num_queries)
        self.marker = nn.Parameter(torch.randn(width) * width**-0.5)

    def behind_marker(self, queries: Tensor) -> Tensor:
        """See the base class; M is 1."""
        return torch.cat([self.marker.to(queries.dtype).expand(len(queries), 1, -1), queries], dim=1)

    @torch.no_grad()
    def start_from(self, embeddings: Tensor) -> None:
        """See the class."""
        mean = embeddings.mean(dim=0, dtype=torch.float32)
        deviation = (1e-9 / len(embeddings)) ** 0.5
        rows = mean.repeat(1 + self.num_queries, 1)
        for part in embeddings.split(8192):  # a whole vocabulary in float32 would be larger than the queries by far
            noise = torch.randn(len(rows), len(part), device=mean.device)
            rows += deviation * noise @ (part.float() - mean)
        self.marker.copy_(rows[0])
        self.table.copy_(rows[1:])


class LearnedGridQueries(QuerySampler):
    """One learned embedding per cell, as many as the image has: a table of which the centre is used.

    WeMMU's ablation "learnable, dynamic number"; how its queries follow the size is not published. The centre crop is that of the
    connector's position table, which alone fits the name.

    Args:
        width: language-model width.
        max_height, max_width: rows and columns of the table; 64 reaches 2048 pixels with a codec of factor 32.

    Raises:
        ValueError: a grid is larger than the table.
    """

    def __init__(self, width: Count, max_height: Count = 64, max_width: Count = 64) -> None:
        super().__init__()
        self.width = width
        self.table = nn.Parameter(torch.randn(max_height, max_width, width) * width**-0.5)

    def forward(self, context: Tokens, grid: Grid, generator: torch.Generator | None = None) -> Tensor:
        """The centre of the table for every row."""
        return centre(self.table, grid).to(context.values.dtype).expand(len(context.values), -1, -1)


class ZeroQueries(QuerySampler):
    """Nothing but a position. Our control: does the noise matter, or only that nothing is learned per slot?"""

    def __init__(self, width: Count) -> None:
        super().__init__()
        self.width = width

    def forward(self, context: Tokens, grid: Grid, generator: torch.Generator | None = None) -> Tensor:
        """Zeros."""
        return context.values.new_zeros(len(context.values), grid.num_cells, self.width)


class FrozenNoiseQueries(QuerySampler):
    """Standard normal numbers drawn once and never again. Our control: does it matter that the noise is drawn again?

    The draw depends on ``seed`` alone, so no checkpoint has to hold it.

    Args:
        width: language-model width.
        max_height, max_width: rows and columns of the draw, of which the centre is used.
        seed: of the draw.

    Raises:
        ValueError: a grid is larger than the draw.
    """

    table: Tensor

    def __init__(self, width: Count, max_height: Count = 64, max_width: Count = 64, seed: Natural = 0) -> None:
        super().__init__()
        self.width = width
        generator = torch.Generator("cpu").manual_seed(seed)
        table = torch.randn(max_height, max_width, width, generator=generator, device="cpu")
        self.register_buffer("table", table.to(torch.get_default_device()), persistent=False)

    def forward(self, context: Tokens, grid: Grid, generator: torch.Generator | None = None) -> Tensor:
        """The centre of the draw for every row."""
        return centre(self.table, grid).to(context.values.dtype).expand(len(context.values), -1, -1)


class PlacedQueries(QuerySampler):
    """Any queries with a position added, for language models whose own position ids hardly tell columns apart. Our addition.

    M-RoPE gives columns the lowest frequencies of a head: at Qwen2.5-VL's base and sections the angle between the two ends of 36
    columns is below 0.01, and learned queries, which know their slot, have an advantage over noise that is not the one in question.

    Args:
        queries: random or learned.
        positions: added to it, on the grid of the queries.

    Raises:
        ValueError: they are of different widths.
    """

    def __init__(self, queries: QuerySampler, positions: PositionEmbedding) -> None:
        super().__init__()
        if queries.width != positions.width:
            raise ValueError(f"PlacedQueries: found positions.width {positions.width}, expected queries.width, {queries.width}")
        self.queries, self.positions, self.width = queries, positions, queries.width

    @property
    def random(self) -> bool:  # type: ignore[override]
        """As the queries inside."""
        return self.queries.random

    def grid_for(self, grid: Grid) -> Grid:
        """As the queries inside."""
        return self.queries.grid_for(grid)

    @property
    def opening(self) -> str:  # type: ignore[override]
        """As the queries inside."""
        return self.queries.opening

    def behind_marker(self, queries: Tensor) -> Tensor:
        """As the queries inside."""
        return self.queries.behind_marker(queries)

    def start_from(self, embeddings: Tensor) -> None:
        """As the queries inside."""
        self.queries.start_from(embeddings)

    def forward(self, context: Tokens, grid: Grid, generator: torch.Generator | None = None) -> Tensor:
        """Queries, placed."""
        return self.positions(self.queries(context, grid, generator), self.grid_for(grid))
