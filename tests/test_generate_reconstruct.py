"""``generate RUN reconstruct``: images drawn again from the states of a language model."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.tools.test_import_ross import EXPERIMENT
from umm_zoo.experiment.build import build
from umm_zoo.experiment.file import load_experiment
from umm_zoo.generate import main


@pytest.fixture
def run(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(EXPERIMENT.replace("GaussianNoisePrediction}", "GaussianNoisePrediction, sampling_steps: 3, first_index: 998}"))
    experiment = load_experiment(file, [])
    method = build(experiment.method)
    state = {key: value for key, value in method.state_dict().items() if key in method.checkpoint_keys()}
    torch.save({"state_dict": state, "experiment": experiment.resolved()}, tmp_path / "run.ckpt")
    return str(tmp_path / "run.ckpt")


def test_images_are_written(run, tmp_path):
    for name in ("one", "two"):
        Image.new("RGB", (20, 16), "red").save(tmp_path / f"{name}.png")
    out = tmp_path / "drawn"
    assert main([run, "reconstruct", str(tmp_path / "one.png"), str(tmp_path / "two.png"), "--out", str(out)]) == 0
    assert {path.name for path in out.glob("0*.png")} == {
        f"{number:03d}-{name}.png" for number in (0, 1) for name in ("round-trip", "reconstruction")
    }
    assert Image.open(out / "000-reconstruction.png").size == (6, 6) and (out / "grid.png").is_file()


def test_no_image_is_one_line(run, capsys):
    assert main([run, "reconstruct"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
