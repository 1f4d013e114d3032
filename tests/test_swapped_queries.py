"""A user's own queries in another folder, swapped in by a YAML of four lines."""

from __future__ import annotations

from pathlib import Path

import torch

from umm_zoo.experiment.build import build
from umm_zoo.experiment.check import check
from umm_zoo.experiment.file import load_experiment
from umm_zoo.testing import check_block

ROOT = Path(__file__).resolve().parents[1]
MINE = '''
import torch
from torch import nn
from umm_zoo.blocks.queries import QuerySampler


class PromptQueries(QuerySampler):
    """Every query is the mean of the prompt, scaled per channel."""

    def __init__(self, width):
        super().__init__()
        self.width, self.scale = width, nn.Parameter(torch.ones(width))

    def forward(self, context, grid, generator=None):
        mean = context.values.mean(dim=1, keepdim=True)
        return (mean * self.scale).expand(-1, grid.num_cells, -1)
'''


def test_four_lines_swap_a_block(tmp_path, monkeypatch):
    (tmp_path / "my_own_queries.py").write_text(MINE)
    experiment = tmp_path / "mine.yaml"
    experiment.write_text(
        f"base: {ROOT}/experiments/wemmu/toy/stage1.yaml\n"
        "method:\n"
        "  queries: {_target_: my_own_queries.PromptQueries, width: 96}\n"
        "trainer: {max_steps: 10}\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded, original = load_experiment(experiment), load_experiment(ROOT / "experiments/wemmu/toy/stage1.yaml")
    check(loaded)
    assert {key for key in original.method if loaded.method[key] != original.method[key]} == {"queries"}
    block = build(loaded.method["queries"])
    check_block(block)
    assert type(block).__name__ == "PromptQueries" and isinstance(block.scale, torch.nn.Parameter)
