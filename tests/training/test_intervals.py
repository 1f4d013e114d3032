"""Validation is counted in optimiser steps, whatever the number of micro-batches."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import toy_parts
from lightning import Callback

from umm_zoo.fit import main


class Few(toy_parts.ToyData):
    """An epoch of 7 batches."""

    def train_dataloader(self) -> Any:
        return self._loader(14)


class Steps(Callback):
    """Notes the steps of validations and of checkpoints."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        with self.file.open("a") as stream:
            stream.write(f"{trainer.global_step}\n")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    tree = toy_parts.toy_experiment()
    tree["data"] = {"_target_": "training.test_intervals.Few"}
    tree["callbacks"] = {"steps": {"_target_": "training.test_intervals.Steps", "file": "steps.txt"}}
    tree["trainer"] |= {"max_steps": 8, "val_check_interval": 3, "log_every_n_steps": 1}
    toy_parts.write_yaml(tmp_path / "toy.yaml", tree)
    return "toy.yaml"


def validated() -> list[int]:
    return [int(line) for line in Path("steps.txt").read_text().split()]


def logged() -> dict[int, list[str]]:
    with Path("runs/toy/logs/metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return {name: [int(row["step"]) for row in rows if row.get(name)] for name in ("train/loss", "val/loss")}


@pytest.mark.parametrize("accumulated", [1, 2, 3, 4])
def test_validation_and_checkpoints_fall_on_the_same_steps(accumulated: int, file: str) -> None:
    """With 7 batches an epoch the last step of one has fewer micro-batches."""
    assert main([file, f"trainer.accumulate_grad_batches={accumulated}"]) == 0
    assert validated() == [3, 6]
    kept = sorted(path.stem for path in Path("runs/toy/checkpoints").glob("*.ckpt"))
    assert kept == ["step-00000006", "step-00000008"]
    assert logged()["val/loss"] == [2, 5] and logged()["train/loss"] == list(range(8))


def test_a_run_that_goes_on_with_other_micro_batches_validates_at_the_same_steps(file: str) -> None:
    assert main([file, "trainer.max_steps=4"]) == 0
    assert main([file, "trainer.accumulate_grad_batches=2", "ckpt=last"]) == 0
    assert validated() == [3, 6]


def test_an_interval_within_an_epoch_stays_lightnings_own(file: str) -> None:
    assert main([file, "trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=0.5", "trainer.max_steps=7"]) == 0
    assert validated() == [3, 6]
