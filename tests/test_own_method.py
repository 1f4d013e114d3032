"""A method of forty lines in a user's own folder: trained, scored and used to generate, word for word as the README says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines import shapes
from umm_zoo import evaluate, fit, generate

README = Path(__file__).parents[1] / "umm_zoo" / "README.md"
COMMANDS = {"umm_zoo.fit": fit, "umm_zoo.evaluate": evaluate, "umm_zoo.generate": generate, "data_pipelines.shapes": shapes}


def test_a_method_of_the_readme_is_trained_scored_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    for name, body in re.findall(r"```(?:python|yaml)\n# (my_method\.\w+)\n(.*?)```", text, re.DOTALL):
        Path(name).write_text(body)
    commands = re.search(r"```bash\n(python -m data_pipelines\.shapes data/mine.*?)```", text, re.DOTALL)[1]  # type: ignore[index]
    for line in commands.splitlines():
        _, _, module, *arguments = shlex.split(line)
        assert COMMANDS[module].main(arguments) == 0, line
    assert len(Path("my_method.py").read_text().splitlines()) <= 45
    scores = json.loads(Path("runs/my_method/metrics.json").read_text())["metrics"]
    assert scores["val/psnr"] > 9.0  # a grey image has 7
    assert json.loads(Path("runs/my_method/evaluation-1.json").read_text())["metrics"]["val/psnr"] == pytest.approx(
        scores["val/psnr"], abs=1e-4
    )
    (image,) = Path("painted").glob("000-*.png")
    assert Image.open(image).size == (32, 32)
