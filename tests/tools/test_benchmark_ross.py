"""The benchmark runs at a tiny size and reports ratios to the baseline."""

from __future__ import annotations

from tools import benchmark_ross


def test_table_of_ratios():
    options = benchmark_ross.parser().parse_args([])
    runs = {arm: {"seconds": 0.1 * (i + 1), "memory": 10.0 + i, "trained": 5.0} for i, arm in enumerate(benchmark_ross.ARMS)}
    lines = benchmark_ross.table(runs, options).splitlines()
    assert lines[4] == "| baseline | 5 | 100 | 1.00 | 10 | 1.00 |" and lines[-1] == "| d | 5 | 400 | 4.00 | 13 | 1.30 |"


def test_every_arm_takes_a_step():
    sizes = ["--batch", "2", "--grid", "2", "--width", "16", "--layers", "1", "--head-width", "16", "--steps", "1"]
    for arm in benchmark_ross.ARMS:
        found = benchmark_ross.measure(benchmark_ross.parser().parse_args(sizes), arm)
        assert found["seconds"] > 0 and found["memory"] >= 0 and found["trained"] > 0
