"""Order of samples in batches of one bucket each, over any other order, and as pure a function of the position."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipelines.shards.order import Stream, kept, permutation

#: Batches that a stretch of samples should hold, where the stream is free to choose: of each bucket up to one is left over.
_LEAST_BATCHES = 32


class BucketedOrder:
    """The samples of another stream, which change places within its spans so that each ``bucket_size`` in a row are of one bucket.

    A span is a window of shards, or some blocks of a weighted mixture. Its samples are dealt out to their buckets in the order of
    the stream, and make groups of ``bucket_size``: of one bucket as far as there are full ones, of neighbours beyond. The groups
    stand at multiples of ``bucket_size``, shuffled; where a global batch has several, they are of different parts of the buckets,
    so that every batch has some of all kinds. What is left of the last buckets stands before the first multiple, where a group of
    the span before ends, and behind the last. Position ``p`` lies in the same span as in the stream, so that nothing is lost or
    repeated, each epoch is complete, and only a span is computed to go on anywhere. A group that crosses the border of two spans,
    or of two epochs, is a mixed one.

    Args:
        stream: of the samples.
        batch_size: samples of a global batch; position 0 begins one.
        buckets: numbers of the buckets of some samples, in the order of their keys; whatever it says, the samples stay the same.
        sizes: number of samples of each source, which are numbered through in this order.
        seed: chooses the order of the groups.
        bucket_size: of which ``batch_size`` is a multiple; None for whole batches.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        buckets: Callable[[NDArray[np.int64]], NDArray[np.int64]],
        sizes: Sequence[int],
        seed: int = 0,
        bucket_size: int | None = None,
    ) -> None:
        self.stream, self.batch_size, self.buckets, self.seed = stream, batch_size, buckets, seed
        self.bucket_size = bucket_size or batch_size
        self._ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
        self._spans: OrderedDict[tuple[int, ...], NDArray[np.int64]] = OrderedDict()

    def span(self, position: int, least: int = 0) -> tuple[int, int]:
        """That of the stream, of enough batches."""
        return self.stream.span(position, max(least, _LEAST_BATCHES * self.batch_size))

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """The sample numbers at positions ``start`` to ``stop - 1``; only the spans they lie in are computed."""
        pieces = [np.empty(0, dtype=np.int64)]
        while start < stop:
            low, high = self.span(start)
            pieces.append(kept(self._spans, (low, high), self._dealt)[start - low : stop - low])
            start = min(stop, high)
        return np.concatenate(pieces)

    def counts(self, position: int) -> list[int]:
        """Number of the first ``position`` samples that came from each source."""
        low, _ = self.span(position)
        sources = np.searchsorted(self._ends, self.take(low, position), side="right")
        within = np.bincount(sources, minlength=len(self._ends))
        return [before + int(more) for before, more in zip(self.stream.counts(low), within, strict=True)]

    def pure_groups(self, position: int) -> tuple[int, int]:
        """How many of the groups within the span of ``position`` are of one bucket, and how many there are."""
        low, high = self.span(position)
        start = -(-low // self.bucket_size) * self.bucket_size
        count = max(0, high - start) // self.bucket_size
        buckets = self.buckets(self.take(start, start + count * self.bucket_size)).reshape(count, self.bucket_size)
        return int((buckets == buckets[:, :1]).all(axis=1).sum()), count

    def _dealt(self, low: int, high: int) -> NDArray[np.int64]:
        samples, size = self.stream.take(low, high), self.bucket_size
        return samples[deal(self.buckets(samples), -low % size, size, self.batch_size // size, self.seed, low, size, 1)]


def deal(buckets: NDArray[np.int64], head: int, size: int, per_batch: int, *key: int) -> NDArray[np.int64]:
    """The order of some samples in which those from ``head`` on stand in groups of one bucket, as many as there are full ones.

    What is left over makes groups of neighbours, shuffled among the others; what is left of the last buckets then comes before
    (``head`` samples) and behind. Of ``per_batch`` groups in a row each is of another part of the groups sorted by bucket. ``key``
    chooses the order of the groups.
    """
    head = min(head, len(buckets))
    places = (len(buckets) - head) // size
    by_bucket = np.split(np.argsort(buckets, kind="stable"), np.cumsum(np.bincount(buckets))[:-1])
    full = [own[start : start + size] for own in by_bucket for start in range(0, len(own) - size + 1, size)]
    left = [own[len(own) - len(own) % size :] for own in by_bucket]
    chosen = permutation(len(full), *key)
    groups = [full[number] for number in chosen[:places]]
    # head and rest may need a group's worth of samples more than the buckets leave over
    left += [full[number] for number in chosen[places:]]
    rest = np.concatenate(left)
    rest = rest[np.argsort(buckets[rest], kind="stable")]
    mixed, ends = np.split(rest, [(places - len(groups)) * size])
    groups += list(mixed.reshape(-1, size))
    order = _shuffled(np.asarray([buckets[group[0]] for group in groups], dtype=np.int64), per_batch, *key)
    return np.concatenate([ends[:head], *[groups[number] for number in order], ends[head:]])


def _shuffled(buckets: NDArray[np.int64], parts: int, *key: int) -> NDArray[np.int64]:
    """An order of groups by chance, of which ``parts`` in a row are of different parts of them by bucket."""
    order = permutation(len(buckets), *key, 0)
    by_bucket = np.array_split(order[np.argsort(buckets[order], kind="stable")], parts)
    shuffled = [part[permutation(len(part), *key, number)] for number, part in enumerate(by_bucket, start=1)]
    rounds = np.concatenate([np.arange(len(part)) for part in shuffled])
    return np.concatenate(shuffled)[np.argsort(rounds, kind="stable")]
