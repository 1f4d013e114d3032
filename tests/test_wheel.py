"""A wheel, installed without a checkout beside it: what ships is found by name, and a project of one's own passes its tests."""

import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

from umm_zoo.errors import UserError
from umm_zoo.experiment.file import load_experiment
from umm_zoo.experiment.shipped import located, shipped_folder

ROOT = Path(__file__).resolve().parents[1]
OURS = [sys.executable, "-m"]


@pytest.mark.processes
def test_project_from_a_wheel_passes_its_tests(tmp_path: Path) -> None:
    build = ["pip", "wheel", "-q", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)]
    source = tmp_path / "source"  # building leaves folders behind
    source.mkdir()
    for name in (
        "umm_zoo",
        "data_pipelines",
        "experiments",
        "setup.py",
        "setup.cfg",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
    ):
        (source / name).symlink_to(ROOT / name)
    build[3] = str(source)
    subprocess.run([*OURS, *build], check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 30e6
    subprocess.run([*OURS, "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=60)
    (installed,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    subprocess.run(
        [*OURS, "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(installed), str(wheel)], check=True, timeout=120
    )
    (installed / "ours.pth").write_text("\n".join(site.getsitepackages()))  # torch and the others, but no editable umm_zoo

    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}

    def run(*arguments: str, cwd: Path) -> str:
        command = [str(tmp_path / "venv" / "bin" / "python"), "-m", *arguments]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("umm_zoo.new", "mine", cwd=tmp_path)
    assert "3 passed" in run("pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path / "mine")


def test_names_of_what_ships_are_read_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("base: umm_zoo:llava/shapes.yaml\nafter: umm_zoo:tiny/llava.yaml\n")
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment("mine.yaml")
    assert experiment.after == str(ROOT / "experiments" / "tiny" / "llava.yaml")
    assert experiment.resolved()["method"]["vlm"]["vision_tower"] == "umm_zoo:tiny/weights/tower"  # the same on every machine
    changed = load_experiment("umm_zoo:llava/shapes.yaml", ["after=umm_zoo:tiny/llava.yaml"])
    assert (changed.name, changed.after) == ("llava-shapes", experiment.after)
    assert located("umm_zoo:tiny/weights/tower") == shipped_folder() / "tiny" / "weights" / "tower"


@pytest.mark.parametrize("name", ["umm_zoo:tiny/weights/towre", "umm_zoo:", "umm_zoo:../setup.cfg", "umm_zoo:/etc/hostname"])
def test_a_name_of_nothing_that_ships_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match="found nothing of that name, expected a file or folder of") as caught:
        located(name)
    assert len(str(caught.value).splitlines()) == 1 and ("did you mean 'tower'?" in str(caught.value)) == name.endswith("towre")
