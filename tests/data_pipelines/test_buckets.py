"""Buckets change places within a window and nothing else: exactly once, any ranks, resumed anywhere, as the order without them."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from order_parts import in_pieces, legs_of_a_run, shard_sizes

from data_pipelines.shards.dealing import BucketedOrder, deal
from data_pipelines.shards.loading import TrainingBatchSampler
from data_pipelines.shards.mixing import BLOCK, ExhaustiveMixture, WeightedMixture
from data_pipelines.shards.order import ShardOrder

windows = st.integers(1, 14)
batch_sizes = st.integers(1, 30)
seeds = st.integers(0, 99)
quick = settings(max_examples=60, deadline=None)


def by_number(count: int):
    """Buckets that look random and depend on the sample alone."""

    def buckets(samples: np.ndarray) -> np.ndarray:
        return np.unique((samples * 2654435761 % 2**32) // 977 % count, return_inverse=True)[1]

    return buckets


def bucketed(sizes: list[int], window: int, batch_size: int, seed: int = 0, buckets=None) -> BucketedOrder:
    return BucketedOrder(ShardOrder(sizes, seed, window), batch_size, buckets or by_number(3), [sum(sizes)], seed)


@quick
@given(shard_sizes, windows, batch_sizes, seeds, st.integers(0, 5))
def test_every_window_holds_the_samples_it_has_without_buckets(sizes, window, batch_size, seed, epoch):
    total, plain, order = sum(sizes), ShardOrder(sizes, seed, window), bucketed(sizes, window, batch_size, seed)
    position = epoch * total
    while position < (epoch + 1) * total:
        low, high = plain.span(position, 0)
        assert low == position < high
        assert sorted(order.take(low, high).tolist()) == sorted(plain.take(low, high).tolist())
        position = high
    assert position == (epoch + 1) * total  # so every epoch holds every sample once
    assert sorted(order.take(epoch * total, position).tolist()) == list(range(total))


@quick
@given(shard_sizes, windows, batch_sizes, st.integers(0, 60), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_any_cut_of_the_stream_is_the_same_stream(sizes, window, batch_size, start, lengths):
    whole = bucketed(sizes, window, batch_size).take(start, start + sum(lengths)).tolist()
    assert in_pieces(lambda: bucketed(sizes, window, batch_size), start, lengths) == whole


@quick
@given(shard_sizes, windows, seeds, st.lists(legs_of_a_run, max_size=4))
def test_a_job_that_changes_its_ranks_at_every_resume_sees_the_straight_order(sizes, window, seed, legs):
    seen: list[int] = []
    steps, batch_size = 0, 12
    for ranks, accumulation, more in legs:  # each leg begins in new processes, which know the position alone
        order = bucketed(sizes, window, batch_size, seed)
        given = (order, lambda at=steps: at * batch_size, batch_size, accumulation, ranks)
        samplers = [iter(TrainingBatchSampler(*given, rank)) for rank in range(ranks)]
        for _ in range(more * accumulation):
            seen += [place.sample for own in samplers for place in next(own)]
        steps += more
    assert seen == bucketed(sizes, window, batch_size, seed).take(0, steps * batch_size).tolist()


@quick
@given(st.lists(st.integers(0, 5), max_size=80), st.integers(0, 12), st.integers(1, 9), st.integers(1, 4), seeds)
def test_as_many_groups_as_possible_are_of_one_bucket(numbers, head, size, per_batch, seed):
    buckets = np.unique(np.asarray(numbers, dtype=np.int64), return_inverse=True)[1]
    order = deal(buckets, head, size, per_batch, seed)
    assert sorted(order.tolist()) == list(range(len(numbers)))
    places = max(0, len(numbers) - head) // size
    full = int((np.bincount(buckets) // size).sum()) if len(buckets) else 0
    groups = [buckets[order[head + n * size : head + (n + 1) * size]] for n in range(places)]
    mixed = sorted((group.tolist() for group in groups if len(set(group.tolist())) > 1), key=lambda group: (group[0], group[-1]))
    assert len(groups) - len(mixed) >= min(full, places)
    assert all(a[-1] <= b[0] for a, b in pairwise(mixed)) and all(group == sorted(group) for group in mixed)  # neighbours


def test_groups_that_a_batch_has_are_of_all_parts_of_the_buckets():
    order = BucketedOrder(ShardOrder([400] * 4, 3, 4), 24, by_number(8), [1600], 3, bucket_size=6)
    groups = by_number(8)(order.take(0, 1584)).reshape(66, 4, 6)
    spread = np.sort(groups.mean(axis=2), axis=1)  # of eight buckets, each quarter has about two
    assert (np.abs(spread - [0.5, 2.5, 4.5, 6.5]) < 1).mean() > 0.97
    assert np.abs(np.corrcoef(groups[:-1, 0, 0], groups[1:, 0, 0])[0, 1]) < 0.35  # one after the other by chance


def test_neighbours_share_groups_and_these_stand_among_the_others():
    lengths = np.random.RandomState(0).permutation(640)  # no two alike: no bucket fills a group
    order = BucketedOrder(ShardOrder([640], 0, 1), 16, lambda samples: lengths[samples], [640])
    groups = lengths[order.take(0, 640)].reshape(40, 16)
    assert (np.ptp(groups, axis=1) == 15).all() and len({*(groups[:, 0] // 16)}) == 40
    assert np.abs(np.corrcoef(groups[:-1, 0], groups[1:, 0])[0, 1]) < 0.35


def test_samples_of_a_bucket_keep_their_shuffled_order_but_batches_are_shuffled():
    plain, order = ShardOrder([600] * 4, 5, 4), bucketed([600] * 4, 4, 8, 5)
    samples, buckets = order.take(0, 2400), by_number(3)(order.take(0, 2400))
    pure = [(buckets[n], samples[n : n + 8]) for n in range(0, 2400, 8) if len(set(buckets[n : n + 8])) == 1]
    places = {sample: place for place, sample in enumerate(plain.take(0, 2400).tolist())}
    assert all(places[a] < places[b] for _, batch in pure for a, b in pairwise(batch.tolist()))
    assert len(pure) >= 297
    same_as_before = np.mean([a[0] == b[0] for a, b in pairwise(pure)])
    assert 0.2 < same_as_before < 0.5  # a third by chance: buckets do not come in blocks


def test_batches_are_of_one_bucket_wherever_the_window_begins():
    order = bucketed([7] * 30, 10, 4)  # windows of 70: every second one begins within a batch
    for low in (0, 70, 140, 210):
        pure, count = order.pure_groups(low)
        assert count >= 16 and pure >= count - 2


@quick
@given(shard_sizes, windows, st.integers(1, 9), seeds)
def test_a_window_reads_no_more_shards_than_it_names(sizes, window, batch_size, seed):
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    read = shard_of[bucketed(sizes, window, batch_size, seed).take(0, sum(sizes))]
    borders = np.flatnonzero(np.diff(read)) + 1
    assert max(len(set(read[i:]) & set(read[: i + 1])) for i in [0, *borders]) <= window


def test_resume_far_into_the_stream_asks_for_the_buckets_of_one_window():
    asked: list[int] = []

    def buckets(samples):
        asked.append(len(samples))
        return by_number(3)(samples)

    bucketed([100] * 1000, 5, 10, buckets=buckets).take(10**9 + 50_250, 10**9 + 50_260)
    assert asked == [500]


def test_the_order_is_frozen():
    # A change of these numbers would silently reorder every run that is resumed; they must never change.
    assert bucketed([2, 3, 1, 4], 2, 3, 7).take(8, 22).tolist() == FROZEN_ORDER
    grouped = BucketedOrder(ShardOrder([20, 30, 10, 40], 7, 4), 12, by_number(3), [100], 7, bucket_size=3)
    assert grouped.take(100, 124).tolist() == FROZEN_GROUPS


sources = st.lists(st.lists(st.integers(1, 900), min_size=1, max_size=4), min_size=1, max_size=4)
few = settings(max_examples=6, deadline=None)


def mixture(sizes: list[list[int]], weighted: bool, batch_size: int = 8, seed: int = 1):
    """A mixture without buckets, and with them."""
    plain = WeightedMixture(sizes, range(1, len(sizes) + 1), seed, 2) if weighted else ExhaustiveMixture(sizes, seed, 2)
    return plain, BucketedOrder(plain, batch_size, by_number(3), [sum(shards) for shards in sizes], seed)


def source_of(sizes: list[list[int]], samples: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), [sum(shards) for shards in sizes])[samples]


@few
@given(sources, st.integers(0, 2 * BLOCK + 99), st.booleans())
def test_counts_of_sources_are_those_of_the_samples_taken(sizes, position, weighted):
    _, order = mixture(sizes, weighted)
    taken = source_of(sizes, order.take(0, position))
    assert order.counts(position) == np.bincount(taken, minlength=len(sizes)).tolist()


@few
@given(sources, st.integers(0, 3 * BLOCK), st.integers(0, 50), st.booleans())
def test_any_cut_of_a_mixture_is_the_same_mixture(sizes, start, length, weighted):
    whole = mixture(sizes, weighted)[1].take(start, start + 2 * length).tolist()
    parts = [(start, start + length), (start + length, start + 2 * length)]
    assert [n for part in parts for n in mixture(sizes, weighted)[1].take(*part).tolist()] == whole


@few
@given(sources, st.integers(0, 3), st.sampled_from([8, 128, 500]))
def test_a_stretch_of_a_weighted_mixture_has_its_samples_and_its_shares(sizes, number, batch_size):
    plain, order = mixture(sizes, True, batch_size)
    low, high = order.span(number * BLOCK)
    assert (high - low) % BLOCK == 0 and high - low >= 32 * batch_size and (batch_size > 128 or high - low == BLOCK)
    assert sorted(order.take(low, high).tolist()) == sorted(plain.take(low, high).tolist())


def test_batches_of_weighted_sources_are_of_one_bucket():
    for batch_size in (32, 256):
        pure, count = mixture([[500, 300], [90], [200]], True, batch_size)[1].pure_groups(0)
        assert count >= 32 and pure >= count - 3  # three buckets leave at most so many batches over


def test_by_exhaustion_every_sample_of_every_source_comes_once():
    samples = mixture([[5, 2], [1], [8]], False, batch_size=4)[1].take(16, 32)
    assert sorted(samples.tolist()) == list(range(16)) and samples.tolist() != sorted(samples.tolist())


FROZEN_ORDER = [8, 4, 3, 5, 2, 4, 8, 0, 6, 7, 1, 9, 8, 6]
FROZEN_GROUPS = [41, 8, 80, 62, 17, 26, 44, 5, 72, 36, 51, 93, 75, 84, 74, 71, 38, 86, 23, 77, 25, 64, 94, 4]
