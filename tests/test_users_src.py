"""A user's package in src layout is found, and its source belongs to the run's record."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import toy_parts

from umm_zoo.experiment.check import check
from umm_zoo.experiment.file import load_experiment
from umm_zoo.experiment.sources import sources_of


def test_a_package_in_src_is_found_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "package_in_src"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "width.py").write_text("WIDTH = 3\n")
    (package / "method.py").write_text("from toy_parts import Toy\nfrom .width import WIDTH\nclass Mine(Toy): pass\n")
    experiment = toy_parts.toy_experiment()
    experiment["method"]["_target_"] = "package_in_src.method.Mine"
    toy_parts.write_yaml(tmp_path / "toy.yaml", experiment)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    loaded = load_experiment("toy.yaml")
    check(loaded)
    assert {"package_in_src", "package_in_src.method", "package_in_src.width"} <= sources_of(loaded).keys()
