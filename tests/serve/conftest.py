"""Servers that the tests of a module share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finished_runs import write_run
from PIL import Image
from test_generate import METHOD
from test_generate_images import WEMMU

from umm_zoo.generation.model import Model
from umm_zoo.method import Method
from umm_zoo.serve.serving import Serving

sys.path.insert(0, str(Path(__file__).parent))
from served import serving

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (20, 12), "blue")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("llava"), METHOD)
    RED.save(folder / "red.png")
    BLUE.save(folder / "blue.png")
    return folder


def loaded(run: Path) -> Model:
    method = Method.load(run)
    return Model.of(method, method.run_data, "cpu")


@pytest.fixture(scope="module")
def llava(run: Path) -> Iterator[Serving]:
    with serving(lambda: loaded(run), window=0.0) as found:
        yield found


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Serving]]:
    run = write_run(tmp_path_factory.mktemp("wemmu"), WEMMU, image_size=32)
    RED.save(run / "red.png")
    BLUE.save(run / "blue.png")
    with serving(lambda: loaded(run), window=0.0) as found:
        yield run, found


@pytest.fixture
def full(llava: Serving, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets batches wait until so many requests are there, however slow this machine is."""

    def wait_for(count: int) -> None:
        monkeypatch.setattr(llava.thread, "batch_size", count)
        monkeypatch.setattr(llava.thread, "window", 600.0)

    return wait_for
