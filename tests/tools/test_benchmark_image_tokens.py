"""The benchmark of image tokens runs at a tiny size and reports ratios to the products."""

from __future__ import annotations

import pytest

from tools import benchmark_image_tokens


def test_table_of_ratios():
    options = benchmark_image_tokens.parser().parse_args([])
    cases = [(scale, arm) for scale in benchmark_image_tokens.SCALES for arm in benchmark_image_tokens.ARMS]
    runs = {case: {"milliseconds": 10.0 + number} for number, case in enumerate(cases)}
    lines = benchmark_image_tokens.table(runs, options).splitlines()
    assert lines[-2:] == ["| 1 | 10.0 | 11.0 | 12.0 | 1.10 | 1.20 |", "| 3 | 13.0 | 14.0 | 15.0 | 1.08 | 1.15 |"]


@pytest.mark.parametrize("scale", benchmark_image_tokens.SCALES)
def test_every_arm_makes_a_call(scale):
    sizes = ["--rows", "4", "--prompts", "2", "--width", "16", "--layers", "1", "--heads", "2", "--inner", "24", "--steps", "1"]
    for arm in benchmark_image_tokens.ARMS:
        found = benchmark_image_tokens.measure(benchmark_image_tokens.parser().parse_args(sizes), (scale, arm))
        assert found["milliseconds"] > 0
