"""What loggers are told: the experiment, rates and norms, images."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_parts
from lightning.pytorch.loggers import Logger
from PIL import Image

from umm_zoo.callbacks.logged import gradient_norm, log_image, rates_of
from umm_zoo.fit import main


class Told(Logger):
    """Logger that writes down what it is told, a line each."""

    name = version = "told"

    def __init__(self, file: str = "told.jsonl") -> None:
        super().__init__()
        self.file = Path(file)

    def _write(self, kind: str, value: Any) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps([kind, value]) + "\n")

    def log_hyperparams(self, params: Any, *arguments: Any, **named: Any) -> None:
        self._write("experiment", params)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._write("metrics", [step, metrics])

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self._write("image", [key, images, step])


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a logger of the experiment is told of a run of four steps."""
    monkeypatch.chdir(tmp_path)
    toy_parts.write_yaml(tmp_path / "toy.yaml", toy_parts.toy_experiment())
    assert (
        main(["toy.yaml", "trainer.max_steps=4", "trainer.log_every_n_steps=2", "loggers.mine={_target_: test_logged.Told}"]) == 0
    )
    return [json.loads(line) for line in Path("told.jsonl").read_text().splitlines()]


def test_loggers_of_the_experiment_come_to_the_standing_ones(told: list[Any]) -> None:
    [experiment] = [value for kind, value in told if kind == "experiment"]
    assert experiment["trainer"]["max_steps"] == 4 and experiment["loggers"] == {"mine": {"_target_": "test_logged.Told"}}
    with Path("runs/toy/logs/metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    lines = [value for kind, value in told if kind == "metrics"]
    assert list(Path("runs/toy/logs").glob("events.*")) and len(lines) == len(rows)
    for (step, values), row in zip(lines, rows, strict=True):
        assert row["step"] == str(step)
        assert {name: float(row[name]) for name in values if name != "step"} == {n: v for n, v in values.items() if n != "step"}


def test_rates_and_gradient_norm_are_logged_at_log_steps(told: list[Any]) -> None:
    found = [(step, values) for kind, (step, values) in (line for line in told if line[0] == "metrics") if "optimiser/lr" in values]
    assert [step for step, _ in found] == [1, 3]
    assert all(values["optimiser/lr"] > 0 and values["optimiser/grad_norm"] > 0 for _, values in found)


def test_norm_is_over_all_groups_and_rates_are_named_where_they_differ() -> None:
    one, two, idle = (torch.nn.Parameter(torch.ones(size)) for size in (2, 3, 4))
    one.grad, two.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0, 12.0])
    optimizer = torch.optim.SGD([{"params": [one], "name": "head"}, {"params": [two, idle], "lr": 0.5}], lr=0.25)
    assert gradient_norm(optimizer).item() == pytest.approx(math.sqrt(9 + 16 + 144))
    assert rates_of(optimizer) == {"/head": 0.25, "/1": 0.5}
    optimizer.param_groups[1]["lr"] = 0.25
    assert rates_of(optimizer) == {"": 0.25}


def test_images_go_to_a_logger_that_takes_them(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (3, 2)).save(file := tmp_path / "samples/step-000007.png")
    logger = Told(str(tmp_path / "told.jsonl"))
    log_image(logger, file, 7)
    assert json.loads(logger.file.read_text()) == ["image", ["samples", [str(file)], 7]]


def test_images_go_to_tensorboard(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "samples").mkdir()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(file := tmp_path / "samples/step-000007.png")
    logger = TensorBoardLogger(tmp_path, name="", version="logs")
    log_image(logger, file, 7)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    [image] = events.Images("samples")
    assert (image.step, image.width, image.height) == (7, 3, 2)


def test_a_logger_whose_library_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    toy_parts.write_yaml(tmp_path / "toy.yaml", toy_parts.toy_experiment())
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    assert main(["toy.yaml", "loggers.wandb={_target_: lightning.pytorch.loggers.WandbLogger, project: mine}"]) == 2
    assert capsys.readouterr().err.startswith("error: toy.yaml: loggers.wandb: lightning.pytorch.loggers.WandbLogger: ")
