"""Imports of large libraries: the garbage collector waits, and a module that nobody uses is not run."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from pathlib import Path

import pytest

from umm_zoo.experiment.importing import defer, importing


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "slow_package" / "inner").mkdir(parents=True)
    (tmp_path / "slow_package" / "__init__.py").write_text("")
    (tmp_path / "slow_package" / "inner" / "__init__.py").write_text("import slow_package\nslow_package.runs = 1\nvalue = 7\n")
    (tmp_path / "slow_package" / "inner" / "leaf.py").write_text("from slow_package.inner import value\nvalue += 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "slow_package.inner"
    for name in [name for name in sys.modules if name.startswith("slow_package")]:
        del sys.modules[name]


def test_the_collector_waits_and_works_afterwards_also_where_an_import_fails() -> None:
    with pytest.raises(ImportError), importing():
        assert not gc.isenabled()
        with importing():
            pass
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_a_deferred_module_runs_once_a_name_of_it_is_used(package: str) -> None:
    defer(package, given=3)
    import_module(package)
    slow_package = sys.modules["slow_package"]
    assert slow_package.inner.given == 3 and hasattr(slow_package.inner, "given") and not hasattr(slow_package, "runs")
    value = import_module("slow_package.inner.leaf").value
    assert (value, slow_package.inner.value, slow_package.inner.given, slow_package.runs) == (8, 7, 3, 1)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        slow_package.inner.missing  # noqa: B018


def test_scipy_keeps_the_name_that_torchmetrics_gives_it() -> None:
    with importing():
        import torchmetrics  # noqa: F401
    import scipy.signal

    assert scipy.signal.hamming(3).tolist() == scipy.signal.windows.hamming(3).tolist()
