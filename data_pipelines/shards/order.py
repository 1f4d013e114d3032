"""Order of samples, as a pure function of (seed, epoch, position).

Nothing here reads a file, knows a rank or keeps a state: position ``p`` of the endless stream holds the same sample whoever asks,
so a run resumes by remembering one number, and ranks, workers and micro-batches cannot change what the whole job sees.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from umm_zoo.errors import UserError

Made = TypeVar("Made")


class Stream(Protocol):
    """An endless stream of sample numbers."""

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """The sample numbers at positions ``start`` to ``stop - 1``."""

    def counts(self, position: int) -> list[int]:
        """Number of the first ``position`` samples that came from each source."""

    def span(self, position: int, least: int) -> tuple[int, int]:
        """First position, and that behind the last, of the samples around ``position`` that may change places with each other.

        At least ``least`` of them, where the stream is free to choose.
        """


def permutation(size: int, *key: int) -> NDArray[np.int64]:
    """A permutation of ``range(size)`` that depends on nothing but ``size`` and the numbers in ``key``.

    ``RandomState`` and not ``Generator``: numpy promises that the former's numbers never change between releases, and an order
    that changed with an upgrade would break every resume.
    """
    words = [word for number in key for word in (number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF)]
    return np.random.RandomState(words).permutation(size).astype(np.int64)


def pieces_of(start: int, stop: int, period: int) -> Iterator[tuple[int, int, int]]:
    """``start`` to ``stop - 1`` in pieces that lie within one period each: its number, and the piece's start and stop within it."""
    while start < stop:
        number, offset = divmod(start, period)
        length = min(stop - start, period - offset)
        yield number, offset, offset + length
        start += length


def kept(cache: OrderedDict[tuple[int, ...], Made], key: tuple[int, ...], make: Callable[..., Made]) -> Made:
    """``make(*key)``, of which a cache keeps the last four: a stream walks through its pieces one after the other."""
    if key not in cache:
        cache[key] = make(*key)
        while len(cache) > 4:
            cache.popitem(last=False)
    return cache[key]


class ShardOrder:
    """Every sample once per epoch, shuffled over shards and within windows of shards.

    Shards are permuted again each epoch, cut into windows of ``window`` shards, and the samples of a window are shuffled together:
    reading stays local (at most ``window`` shards are open at a time) while neighbours in a shard are torn apart. Position ``p``
    lies in epoch ``p // num_samples``.

    Args:
        sizes: number of samples of each shard; samples are numbered through in this order.
        seed: chooses the order.
        window: shards whose samples are shuffled together; 0 keeps every epoch in the written order.
    """

    def __init__(self, sizes: Sequence[int], seed: int = 0, window: int = 16) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.num_samples = int(self.sizes.sum())
        if self.num_samples < 1:
            raise ValueError(f"order: found {len(self.sizes)} shards with {self.num_samples} samples, at least one is needed")
        if window < 0:
            raise UserError("data.window", str(window), "0 (no shuffling) or a positive number of shards")
        self.seed, self.window = seed, window
        self._first = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])  # number of each shard's first sample
        self._epochs: OrderedDict[tuple[int, ...], tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, ...], NDArray[np.int64]] = OrderedDict()

    def counts(self, position: int) -> list[int]:
        """All of them came from the one source."""
        return [position]

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """The sample numbers at positions ``start`` to ``stop - 1``; only the windows they lie in are computed."""
        pieces = [self._within(*piece) for piece in pieces_of(start, stop, self.num_samples)]
        return np.concatenate([np.empty(0, dtype=np.int64), *pieces])

    def span(self, position: int, least: int) -> tuple[int, int]:
        """A window."""
        epoch, offset = divmod(position, self.num_samples)
        borders = epoch * self.num_samples + kept(self._epochs, (epoch,), self._shards)[1]
        last = int(np.searchsorted(borders, epoch * self.num_samples + offset, side="right"))
        return int(borders[last - 1]), int(borders[last])

    def _within(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        if self.window == 0:
            return np.arange(start, stop, dtype=np.int64)
        borders = kept(self._epochs, (epoch,), self._shards)[1]
        first = int(np.searchsorted(borders, start, side="right")) - 1
        pieces = []
        for window in range(first, len(borders) - 1):
            low, high = int(borders[window]), int(borders[window + 1])
            if low >= stop:
                break
            pieces.append(kept(self._windows, (epoch, window), self._samples)[max(start - low, 0) : min(stop, high) - low])
        return np.concatenate(pieces)

    def _shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's permuted shards, and the positions at which its windows begin (and the last ends)."""
        shards = permutation(len(self.sizes), self.seed, epoch)
        ends = np.cumsum(self.sizes[shards])
        borders = np.concatenate([[0], ends[self.window - 1 :: self.window]])
        return shards, borders if borders[-1] == self.num_samples else np.append(borders, self.num_samples)

    def _samples(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The shuffled sample numbers of one window."""
        chosen = kept(self._epochs, (epoch,), self._shards)[0][window * self.window : (window + 1) * self.window]
        samples = np.concatenate([np.arange(self._first[s], self._first[s] + self.sizes[s]) for s in chosen])
        return samples[permutation(len(samples), self.seed, epoch, window + 1)]


def rank_slice(batch_size: int, accumulation: int, micro_batch: int, num_ranks: int, rank: int) -> slice:
    """The part of a global batch that ``rank`` reads in its ``micro_batch``-th of ``accumulation`` micro-batches.

    Micro-batch after micro-batch and within it rank after rank, the slices put the global batch together again in its order.
    """
    shares = accumulation * num_ranks
    if batch_size % shares or batch_size < shares:
        micro_batches = f"{accumulation} micro-batches (trainer.accumulate_grad_batches)"
        found = f"{batch_size}, which {num_ranks} ranks x {micro_batches} cannot share out evenly"
        raise UserError("data.batch_size", found, f"a multiple of {shares}")
    size = batch_size // shares
    first = (micro_batch * num_ranks + rank) * size
    return slice(first, first + size)
