"""The benchmark's two arms are one step: the same loss."""

from __future__ import annotations

import torch

from tools import benchmark_bridge

SMALL = ["--batch", "2", "--width", "32", "--layers", "2", "--queries", "5"]


def test_both_arms_have_the_same_loss():
    options = benchmark_bridge.parser().parse_args(SMALL)
    losses = []
    for arm in benchmark_bridge.ARMS:
        method = benchmark_bridge.build_method(options)
        torch.manual_seed(1)
        losses.append(benchmark_bridge.loss_of(method, benchmark_bridge.request(options, 24), arm).item())
    assert abs(losses[0] - losses[1]) < 1e-4


def test_table_names_ratios():
    options = benchmark_bridge.parser().parse_args(["--lengths", "64"])
    found = {(64, "naive"): {"seconds": 3.0, "memory": 90.0}, (64, "ours"): {"seconds": 1.5, "memory": 30.0}}
    assert "| 64 | 3.000 | 1.500 | 2.00 x | 90 | 30 | 3.00 x |" in benchmark_bridge.table(found, options)
