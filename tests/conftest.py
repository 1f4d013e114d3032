"""Tiers of the tests, the marks that hold them, and what is set before torch is imported."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
from nursery import Nursery

# the tests share the cores: threads of torch that wait for each other would cost a hundred times the work
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests out unless ``-m`` names them, so that ``-m "not processes"`` is a quick tier by itself."""
    if "long" not in str(config.getoption("-m")):
        long = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


gc.disable()  # while the libraries are imported, whose objects stay


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collect garbage again, but spare what the imports have made: a pass over it takes a third of a second."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(autouse=True)
def _processes_are_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("processes"):
        return
    popen = subprocess.Popen.__init__

    def refuse(*arguments: Any, **options: Any) -> None:
        pytest.fail("this test starts a process: it lacks the mark 'processes'")

    def other_programs(self: Any, command: Any, *arguments: Any, **options: Any) -> None:
        if os.path.basename(command[0]).startswith("python"):  # that of a nursery, too
            refuse()
        popen(self, command, *arguments, **options)  # git and bash take milliseconds

    monkeypatch.setattr(BaseProcess, "start", refuse)
    monkeypatch.setattr(subprocess.Popen, "__init__", other_programs)
