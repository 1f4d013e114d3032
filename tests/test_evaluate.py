"""``evaluate``: which of an experiment's callbacks take part in a validation, and which words are refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finished_runs import write_run
from lightning import Callback, LightningModule, Trainer
from toy_parts import OneWeight

from umm_zoo.batch import Batch
from umm_zoo.evaluate import main
from umm_zoo.outputs import Outputs

TRUSTED = ["--trust", Path(__file__).stem, "--trust", "toy_parts"]


class Size(OneWeight):
    """Says what a validation is wanted for."""

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        found = {"longest": self.wanted.max_new_tokens, "made": self.wanted.generates(batch_idx)}
        return Outputs({name: torch.tensor(float(value)) for name, value in found.items()})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    sys.modules.setdefault(Path(__file__).stem, sys.modules[__name__])
    return write_run(
        tmp_path / "run",
        {"_target_": f"{Path(__file__).stem}.Size"},
        data={"_target_": "toy_parts.ToyData", "size": 8},  # four batches of two
        metrics={"m": {"_target_": "umm_zoo.metrics.means.Means", "names": ["longest", "made"]}},
        callbacks={"validation": {"_target_": "umm_zoo.callbacks.Validation", "max_new_tokens": 7, "num_generated_batches": 3}},
    )


def test_a_validation_is_of_the_size_that_the_experiment_says(run: Path) -> None:
    assert main([str(run), *TRUSTED]) == 0
    assert (
        main(
            [
                str(run),
                "--trust",
                Path(__file__).stem,
                "--trust",
                "toy_parts",
                "callbacks.validation.max_new_tokens=5",
                "trainer.limit_val_batches=2",
            ]
        )
        == 0
    )
    first, second = (json.loads((run / f"evaluation-{number}.json").read_text())["metrics"] for number in (1, 2))
    assert first == {"val/m/longest": 7.0, "val/m/made": 0.75}
    assert second == {"val/m/longest": 5.0, "val/m/made": 1.0}


class Longer(Callback):
    """Wants longer answers."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.wanted = replace(pl_module.wanted, max_new_tokens=9)


def test_a_callback_takes_part_where_an_override_names_it(run: Path) -> None:
    assert main([str(run), *TRUSTED, f"callbacks.longer={{_target_: {Path(__file__).stem}.Longer}}"]) == 0
    assert json.loads((run / "evaluation-1.json").read_text())["metrics"]["val/m/longest"] == 9.0


def test_words_behind_a_validation_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), *TRUSTED, "validation", "images"]) == 2
    assert "found 'validation' behind the run, expected key=value" in capsys.readouterr().err
