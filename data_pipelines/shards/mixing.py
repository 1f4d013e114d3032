"""Mixtures of several sources as one stream: by weight, or until every sample of every source has been read once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipelines.shards.order import ShardOrder, Stream, kept, permutation, pieces_of
from umm_zoo.errors import UserError

#: Positions per block of a weighted mixture. Shares are kept exactly within each block, so a weight is honoured to one part in this
#: many (our choice: finer than any published mixture needs, and a block takes well under a millisecond).
BLOCK = 4096


def quotas(weights: Sequence[float], total: int = BLOCK) -> list[int]:
    """Share ``total`` places among ``weights`` by largest remainder; every positive weight gets at least one place."""
    shares = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
        raise UserError("data.train", f"weights {list(weights)}", "finite ones, not negative and not all zero")
    positive = shares > 0
    if positive.sum() > total:
        raise UserError("data.train", f"{int(positive.sum())} sources with a weight", f"at most {total}")
    exact = shares / shares.sum() * total
    counts = np.floor(exact).astype(np.int64)
    for index in np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]:
        counts[index] += 1
    for index in np.flatnonzero(positive & (counts == 0)):  # too small a share for one place: the largest gives it one of its own
        counts[np.argmax(counts)] -= 1
        counts[index] = 1
    return counts.tolist()


class WeightedMixture:
    """Sources in fixed shares, each walking through its own epochs.

    The stream is cut into blocks of ``BLOCK`` positions. A block holds a whole number of places of each source (largest remainder),
    in an order permuted by (seed, block). A source's own position is therefore known in closed form at every position of the
    stream, and nothing has to be replayed on resume.

    Args:
        sizes: for each source, the sizes of its shards.
        weights: for each source, its share of the stream (any scale). A source of weight 0 is never read.
        seed, window: as in ``ShardOrder``.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], weights: Sequence[float], seed: int = 0, window: int = 16) -> None:
        self.seed = seed
        self.shares = quotas(weights)
        self.orders = [ShardOrder(shards, permuted_seed(seed, index), window) for index, shards in enumerate(sizes)]
        ends = np.cumsum([order.num_samples for order in self.orders])
        self._first = np.concatenate([[0], ends[:-1]])
        self._blocks: OrderedDict[tuple[int, ...], tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()

    def counts(self, position: int) -> list[int]:
        """Number of the first ``position`` samples that came from each source."""
        block, offset = divmod(position, BLOCK)
        within = np.bincount(kept(self._blocks, (block,), self._block)[0][:offset], minlength=len(self.shares))
        return [block * share + int(more) for share, more in zip(self.shares, within, strict=True)]

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """The sample numbers (numbered through all sources) at positions ``start`` to ``stop - 1``."""
        pieces = [self._within(*piece) for piece in pieces_of(start, stop, BLOCK)]
        return np.concatenate([np.empty(0, dtype=np.int64), *pieces])

    def span(self, position: int, least: int) -> tuple[int, int]:
        """As few blocks as hold ``least`` samples: over them the shares are exact, in whatever order."""
        size = max(1, -(-least // BLOCK)) * BLOCK
        return position // size * size, (position // size + 1) * size

    def _within(self, block: int, start: int, stop: int) -> NDArray[np.int64]:
        sources, turns = kept(self._blocks, (block,), self._block)
        sources, turns = sources[start:stop], turns[start:stop]
        samples = np.empty(len(sources), dtype=np.int64)
        for source in np.unique(sources):
            chosen = sources == source
            first = block * self.shares[source] + int(turns[chosen][0])
            samples[chosen] = self._first[source] + self.orders[source].take(first, first + int(chosen.sum()))
        return samples

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source of each place of a block, and how often that source came before within the block."""
        sources = np.repeat(np.arange(len(self.shares)), self.shares)[permutation(BLOCK, self.seed, block)]
        turns = np.empty(BLOCK, dtype=np.int64)
        for source, share in enumerate(self.shares):
            turns[sources == source] = np.arange(share)
        return sources, turns


class ExhaustiveMixture(ShardOrder):
    """Every sample of every source (each given as the sizes of its shards) once per epoch of the whole: shares follow the sizes."""

    def __init__(self, sizes: Sequence[Sequence[int]], seed: int = 0, window: int = 16) -> None:
        super().__init__([size for shards in sizes for size in shards], seed, window)
        self._totals = [sum(shards) for shards in sizes]

    def counts(self, position: int) -> list[int]:
        """Number of the first ``position`` samples that came from each source; the started epoch is gone through once."""
        epochs, offset = divmod(position, self.num_samples)
        sources = np.searchsorted(np.cumsum(self._totals), self.take(position - offset, position), side="right")
        within = np.bincount(sources, minlength=len(self._totals))
        return [epochs * total + int(more) for total, more in zip(self._totals, within, strict=True)]


def permuted_seed(seed: int, index: int) -> int:
    """A seed of its own for each source, so that two sources of equal sizes do not walk in step."""
    return int(np.random.RandomState([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, index]).randint(0, 2**62, dtype=np.int64))


def make_stream(sizes: Mapping[str, list[int]], weights: Mapping[str, float | None], seed: int, window: int) -> Stream:
    """The training stream of sources of these sizes of shards; each has a weight, or none of them has."""
    given = [weight for weight in weights.values() if weight is not None]
    if given and len(given) < len(weights):
        missing = [name for name, weight in weights.items() if weight is None]
        raise UserError("data.train", f"sources {missing} have no weight while others have; give all of them one, or none")
    shards = list(sizes.values())
    if len(shards) == 1:
        return ShardOrder(shards[0], seed, window)
    return WeightedMixture(shards, given, seed, window) if given else ExhaustiveMixture(shards, seed, window)
