"""The script that trains the shipped parts: names are checked before anything is set up."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "train_tiny.sh"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A copy whose set-up says that it was reached and stops there."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "setup.sh").write_text("echo reached; exit 9\n")
    return Path(shutil.copy(SCRIPT, tmp_path / "tools"))


@pytest.mark.parametrize("names", [["vlm-base"], ["codec", "vlm-vision"], ["codec tower"], [""], ["../llava/shapes"]])
def test_what_is_no_part_is_refused(names: list[str], script: Path) -> None:
    done = subprocess.run(["bash", str(script), *names], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    expected = "codec tower clip clip2 clip8 ssl1 ssl2 deit llava vlm sana sd3 tower_coarse"
    assert done.stderr == f"error: found no part '{names[-1]}', expected {expected}\n"


@pytest.mark.parametrize("names", [[], ["deit"], ["tower", "llava"]])
def test_parts_go_on_to_the_set_up(names: list[str], script: Path) -> None:
    done = subprocess.run(["bash", str(script), *names], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (9, "reached\n")
