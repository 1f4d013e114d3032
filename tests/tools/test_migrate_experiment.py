"""Experiment files of the earlier version come out as files of this one, comments and order kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tools.migrate_experiment import main

OLD = """# A file of the earlier version.
name: old
method:
  _target_: umm_zoo.methods.llava.LLaVA
  vlm: ${vars.vlm}
  # what is trained
  trained: [projector]
  max_new_tokens: 8                         # short
  optimizer:
    _target_: umm_zoo.optimization.AdamW
    lr: 1.0e-3
  schedule: {_target_: umm_zoo.optimization.WarmupCosine, total_steps: "${trainer.max_steps}"}

data: {_target_: data_pipelines.shards.ShardData}

metrics:
  edits: {_target_: umm_zoo.metrics.EditSuccess}

trainer: {max_steps: 4}
"""


def migrated(folder: Path, text: str, name: str = "old.yaml") -> dict:
    file = folder / name
    file.write_text(text)
    assert main([str(file)]) == 0
    return yaml.safe_load(file.read_text())


def test_training_and_validation_leave_the_method_and_names_are_the_new_ones(tmp_path: Path) -> None:
    tree = migrated(tmp_path, OLD)
    assert list(tree) == ["name", "method", "training", "data", "callbacks", "metrics", "trainer"]
    assert tree["method"] == {"_target_": "umm_zoo.methods.llava.LLaVA", "vlm": "${vars.vlm}"}
    assert list(tree["training"]) == ["trained", "optimizer", "schedule"]
    assert tree["training"]["optimizer"]["_target_"] == "umm_zoo.training.optimization.AdamW"
    assert tree["callbacks"]["validation"] == {"_target_": "umm_zoo.callbacks.Validation", "max_new_tokens": 8}
    assert tree["metrics"]["edits"]["_target_"] == "umm_zoo.shapes.editing_metrics.EditSuccess"
    text = (tmp_path / "old.yaml").read_text()
    assert "  # what is trained\n  trained: [projector]\n" in text and "max_new_tokens: 8                         # short" in text


def test_a_second_time_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    migrated(tmp_path, OLD)
    once = (tmp_path / "old.yaml").read_text()
    migrated(tmp_path, once)
    assert (tmp_path / "old.yaml").read_text() == once and "as it was" in capsys.readouterr().out


def test_a_child_is_understood_through_its_base(tmp_path: Path) -> None:
    migrated(tmp_path, OLD)
    child = migrated(tmp_path, "base: old.yaml\nmethod:\n  max_new_tokens: 3\n  optimizer: {lr: 2.0}\n", "child.yaml")
    assert child == {
        "base": "old.yaml",
        "training": {"optimizer": {"lr": 2.0}},
        "callbacks": {"validation": {"_target_": "umm_zoo.callbacks.Validation", "max_new_tokens": 3}},
    }
    other = "base: old.yaml\nmethod:\n  _target_: umm_zoo.methods.uae.UAE\n  trained: [connector]\n  max_new_tokens: 9\n"
    stage = migrated(tmp_path, other, "other.yaml")
    assert stage["training"] == {"trained": ["connector"], "schedule": None}  # the base's would hold otherwise
    assert stage["method"]["captions"]["max_new_tokens"] == 9


def test_paths_of_a_compare_file(tmp_path: Path) -> None:
    tree = migrated(tmp_path, "vary: method.head\nalso: [method.trained]\nset: {method.optimizer.lr: 0.1}\n", "compare.yaml")
    assert tree == {"vary": "method.head", "also": ["training.trained"], "set": {"training.optimizer.lr": 0.1}}


def test_a_method_in_one_line_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flow.yaml").write_text("method: {trained: [head]}\n")
    assert main([str(tmp_path / "flow.yaml")]) == 2
    assert "put its arguments on lines of their own" in capsys.readouterr().err
