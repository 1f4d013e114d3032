"""The benchmark's two arms are one step: the same loss."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import benchmark_bridge

SMALL = ["--batch", "2", "--width", "32", "--layers", "2", "--queries", "5", "--lengths", "24"]


def test_both_arms_have_the_same_loss(capsys):
    assert benchmark_bridge.main(["--check", *SMALL]) == 0
    assert "loss naive" in capsys.readouterr().out


def test_table_names_ratios():
    options = benchmark_bridge.parser().parse_args(["--lengths", "64"])
    results = {(64, "naive"): [{"seconds": 3.0, "memory": 90.0}], (64, "ours"): [{"seconds": 1.5, "memory": 30.0}]}
    assert "| 64 | 3.000 | 1.500 | 2.00 x | 90 | 30 | 3.00 x |" in benchmark_bridge.table(results, options)
