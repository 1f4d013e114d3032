"""Both arms train on the same rows as often, and rows of like lengths waste less."""

from __future__ import annotations

import pytest

from tools import benchmark_lengths
from umm_zoo.backbones.tokenizer import load_tokenizer


@pytest.mark.parametrize("spread", ["log", "even"])
def test_answers_have_all_lengths_up_to_the_longest(spread):
    texts = [row["json"]["conversations"][1]["text"] for row in benchmark_lengths.rows(40, 20, spread, seed=0)]
    lengths = sorted(len(load_tokenizer()(" " + text)["input_ids"]) for text in texts)
    assert lengths[0] == 1 and lengths[-1] == 20
    assert (lengths[20] < 7) == (spread == "log")


def test_both_arms_learn_and_buckets_compute_less_for_a_useful_token(tmp_path):
    sizes = {"rows": 64, "epochs": 1, "batch": 4, "longest": 200, "width": 16, "layers": 1, "block": 4}
    options = benchmark_lengths.parser().parse_args([word for name, size in sizes.items() for word in (f"--{name}", str(size))])
    plain, bucketed = benchmark_lengths.measure(tmp_path, options).values()
    assert len(plain.losses) == len(bucketed.losses) == 8 and plain.losses[0] > plain.losses[-1]
    assert plain.tokens[1] / plain.tokens[0] > 1.3 * bucketed.tokens[1] / bucketed.tokens[0]
