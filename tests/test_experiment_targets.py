"""The static guard over ``_target_``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import check_targets  # noqa: E402


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("umm_zoo.training.optimization.AdamW", None),
        ("umm_zoo.method.Method.load", None),
        ("umm_zoo.method.Precomputable", None),  # imported there from another module
        ("torch.nn.Linear", None),
        ("umm_zoo.training.optimization.Adam", "names 'Adam', which umm_zoo/training/optimization.py does not define as a class"),
        ("umm_zoo.optimisation.AdamW", "names 'optimisation', which umm_zoo/__init__.py does not define as a class"),
        ("umm_zoo.backbones.frozen.freeze", "names 'freeze', which umm_zoo/backbones/frozen.py does not define as a class"),
        ("umm_zoo.method", "is a module, not a class"),
        ("umm_zoo.batch.Batch.to", "names 'to', which is no classmethod of Batch"),
        ("toolbox.Thing", "is of 'toolbox', which setup.cfg does not require"),
        ("AdamW", "is no dotted path"),
        (7, "is no dotted path"),
    ],
)
def test_target_is_judged_from_the_source(target: object, problem: str | None) -> None:
    assert check_targets.problem_of(target) == problem


def test_nodes_are_found_in_maps_and_lists(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("a: {_target_: umm_zoo.batch.Grid, b: [{_target_: umm_zoo.batch.Grit}]}\nc: ${a}")
    problems, count = check_targets.check_folder(tmp_path)
    assert count == 2 and len(problems) == 1
    assert "e.yaml: a.b[0]._target_: 'umm_zoo.batch.Grit' names 'Grit'" in problems[0]


def test_targets_of_the_repository_exist() -> None:
    assert check_targets.main([]) == 0
