from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.shards.mixing import BLOCK, ExhaustiveMixture, WeightedMixture, quotas

sources = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4)
quick = settings(max_examples=40, deadline=None)


def source_of(sizes: list[list[int]], samples: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), [sum(shards) for shards in sizes])[samples]


@quick
@given(sources, st.data())
def test_each_source_walks_through_its_own_epochs(sizes, data):
    weights = data.draw(st.lists(st.floats(0.1, 9), min_size=len(sizes), max_size=len(sizes)))
    samples = WeightedMixture(sizes, weights, seed=3, window=2).take(0, 700)
    for source, shards in enumerate(sizes):
        own, size = samples[source_of(sizes, samples) == source].tolist(), sum(shards)
        for first in range(0, len(own) - size + 1, size):
            assert len(set(own[first : first + size])) == size


@quick
@given(sources, st.integers(0, 3 * BLOCK), st.integers(0, 50), st.booleans())
def test_any_cut_of_a_mixture_is_the_same_mixture(sizes, start, length, weighted):
    def mixture():
        return WeightedMixture(sizes, [1.0] * len(sizes), 1, 2) if weighted else ExhaustiveMixture(sizes, 1, 2)

    whole = mixture().take(start, start + 2 * length).tolist()
    cut = mixture().take(start, start + length).tolist() + mixture().take(start + length, start + 2 * length).tolist()
    assert whole == cut


@quick
@given(sources, st.integers(0, 2 * BLOCK + 99), st.booleans())
def test_counts_are_those_of_the_samples_taken(sizes, position, weighted):
    mixture = WeightedMixture(sizes, range(1, len(sizes) + 1), 1, 2) if weighted else ExhaustiveMixture(sizes, 1, 2)
    taken = Counter(source_of(sizes, mixture.take(0, position)).tolist())
    assert mixture.counts(position) == [taken[source] for source in range(len(sizes))]


def test_weights_are_kept_in_every_block():
    sizes = [[50], [9, 9], [4]]
    taken = source_of(sizes, WeightedMixture(sizes, [6, 3, 1]).take(5 * BLOCK, 6 * BLOCK))
    shares = np.bincount(taken) / BLOCK
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=1 / BLOCK)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9).filter(lambda w: sum(w) > 0))
def test_quotas_add_up_and_forget_no_source(weights):
    shares = quotas(weights, 100)
    assert sum(shares) == 100 and all((share > 0) == (weight > 0) for share, weight in zip(shares, weights, strict=True))


def test_by_exhaustion_every_sample_of_every_source_comes_once():
    samples = ExhaustiveMixture([[5, 2], [1], [8]], seed=4, window=2).take(16, 32)
    assert sorted(samples.tolist()) == list(range(16))


@pytest.mark.parametrize("weights", [[0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]])
def test_weights_without_meaning_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        quotas(weights)
