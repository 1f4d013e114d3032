import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from order_parts import in_pieces, legs_of_a_run, shard_sizes

from data_pipelines.shards.loading import TrainingBatchSampler
from data_pipelines.shards.order import ShardOrder, permutation, rank_slice

windows = st.integers(0, 14)
quick = settings(max_examples=150, deadline=None)


@quick
@given(shard_sizes, windows, st.integers(0, 2**63), st.integers(0, 5))
def test_every_epoch_holds_every_sample_once(sizes, window, seed, epoch):
    total = sum(sizes)
    samples = ShardOrder(sizes, seed, window).take(epoch * total, (epoch + 1) * total)
    assert sorted(samples.tolist()) == list(range(total))


@quick
@given(shard_sizes, windows, st.integers(0, 99), st.integers(0, 60), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_any_cut_of_the_stream_is_the_same_stream(sizes, window, seed, start, lengths):
    whole = ShardOrder(sizes, seed, window).take(start, start + sum(lengths)).tolist()
    assert in_pieces(lambda: ShardOrder(sizes, seed, window), start, lengths) == whole


@quick
@given(shard_sizes, windows, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 50))
def test_ranks_and_micro_batches_share_a_batch_out_in_its_order(sizes, window, ranks, accumulation, each, position):
    batch_size = ranks * accumulation * each
    batch = ShardOrder(sizes, 3, window).take(position, position + batch_size).tolist()
    shared = [batch[rank_slice(batch_size, accumulation, m, ranks, r)] for m in range(accumulation) for r in range(ranks)]
    assert [sample for share in shared for sample in share] == batch
    assert {len(share) for share in shared} == {each}


@quick
@given(shard_sizes, st.integers(1, 14), st.integers(0, 99))
def test_a_window_reads_no_more_shards_than_it_names(sizes, window, seed):
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    read = shard_of[ShardOrder(sizes, seed, window).take(0, sum(sizes))]
    borders = np.flatnonzero(np.diff(read)) + 1
    open_at_once = max(len(set(read[i:]) & set(read[: i + 1])) for i in [0, *borders])
    assert open_at_once <= window


@quick
@given(shard_sizes, windows, st.integers(0, 9), st.lists(legs_of_a_run, max_size=4))
def test_a_job_that_changes_its_ranks_at_every_resume_sees_the_straight_order(sizes, window, seed, legs):
    seen: list[int] = []
    steps, batch_size = 0, 12
    for ranks, accumulation, more in legs:  # each leg begins in new processes, which know the position alone
        order = ShardOrder(sizes, seed, window)
        given = (order, lambda at=steps: at * batch_size, batch_size, accumulation, ranks)
        samplers = [iter(TrainingBatchSampler(*given, rank)) for rank in range(ranks)]
        for _ in range(more * accumulation):
            seen += [place.sample for own in samplers for place in next(own)]
        steps += more
    assert seen == ShardOrder(sizes, seed, window).take(0, steps * batch_size).tolist()


def test_seeds_and_epochs_give_other_orders():
    order = ShardOrder([20, 20, 20], 5, 2)
    first, second = order.take(0, 60).tolist(), order.take(60, 120).tolist()
    assert first != second and first != ShardOrder([20, 20, 20], 6, 2).take(0, 60).tolist()
    assert first != sorted(first)


def test_window_zero_is_the_written_order():
    assert ShardOrder([3, 4], window=0).take(5, 9).tolist() == [5, 6, 0, 1]


def test_the_order_is_frozen():
    # A change of these numbers would silently reorder every run that is resumed; they must never change.
    assert permutation(8, 1, 2).tolist() == FROZEN_PERMUTATION
    assert ShardOrder([2, 3, 1, 4], seed=7, window=2).take(8, 22).tolist() == FROZEN_ORDER


def test_resume_far_into_the_stream_computes_one_window(monkeypatch):
    from data_pipelines.shards import order as module

    asked = []
    real = module.permutation
    monkeypatch.setattr(module, "permutation", lambda size, *key: asked.append(size) or real(size, *key))
    ShardOrder([100] * 1000, window=5).take(10**9 + 50_250, 10**9 + 50_260)
    assert asked == [1000, 500]


@pytest.mark.parametrize("arguments", [([],), ([0, 0],), ([3], 0, -1)])
def test_orders_of_nothing_are_refused(arguments):
    with pytest.raises(ValueError, match=r"order|window"):
        ShardOrder(*arguments)


FROZEN_PERMUTATION = [1, 5, 2, 3, 4, 6, 7, 0]
FROZEN_ORDER = [6, 8, 3, 5, 2, 4, 7, 8, 1, 0, 6, 9, 6, 9]
