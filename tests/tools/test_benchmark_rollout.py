"""The benchmark of rollouts runs both of its arms, and both compute the same policy gradient."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "benchmark_rollout_tool", Path(__file__).parents[2] / "tools" / "benchmark_rollout.py"
)
tool = importlib.util.module_from_spec(spec)
sys.modules["benchmark_rollout_tool"] = tool
spec.loader.exec_module(tool)


@pytest.mark.parametrize("arm", tool.ARMS)
def test_an_arm_runs_and_its_phases_are_the_step(arm: str):
    words = ["--batch", "2", "--group", "2", "--tokens", "4", "--width", "32", "--size", "32", "--steps", "1", "--arm", arm]
    found = tool.measure(tool.parser().parse_args(words))
    assert set(found) == {*tool.PHASES, "samples_per_second", "peak_mb"}
    assert found["caption"] > 0 and found["score"] > 0 and found["samples_per_second"] > 0


def test_table_gives_shares_and_the_ratio():
    turn = {**dict.fromkeys(tool.PHASES, 0.2), "samples_per_second": 4.0, "peak_mb": 100.0}
    text = tool.table({"ours": [turn], "library": [{**turn, "samples_per_second": 2.0}]})
    assert "(20.0 %)" in text and text.endswith("2.00 times as fast")
