"""The notebooks, cell by cell, at toy size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "notebooks"


def run(name: str, **parameters: Any) -> dict[str, Any]:
    """The names of a notebook after its last cell, with other parameters."""
    found: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}.ipynb, cell {number}", "exec"), found)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert set(parameters) <= set(found)
                found |= parameters
    return found


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_photographs_are_described(here: Path) -> None:
    (here / "photos").mkdir()
    lines = ["file,caption"]
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (30 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(here / "photos" / f"{number}.jpg")
        lines.append(f"{number}.jpg,a dog and {number} trees")
    (here / "photos.csv").write_text("\n".join(lines))
    found = run("photographs", steps=2, batch=2, size=32)
    assert isinstance(found["caption"], str) and isinstance(found["answer"], str)
    assert (here / "released" / "mine" / "chat_template.jinja").is_file()


def test_a_block_of_ones_own_stands_beside_the_paper_s(here: Path) -> None:
    few = ["data.val_batch_size=2", "trainer.limit_val_batches=1", "callbacks.samples=null", "callbacks.throughput=null"]
    found = run("own_block", steps=1, batch=2, samples=8, trainer=few)
    assert (
        set(found["scores"]) == {"transformer", "plain"}
        and found["scores"]["plain"].keys() == found["scores"]["transformer"].keys()
    )
    assert found["images"]["plain"].size == (32, 32)
