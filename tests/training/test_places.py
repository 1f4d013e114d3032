"""Errors of callbacks, metrics and loggers of an experiment: one line with their place, exit code 2, the checkpoint kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toy_parts
import yaml
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import Metric

from umm_zoo.errors import UserError
from umm_zoo.evaluate import main as evaluate
from umm_zoo.fit import main
from umm_zoo.metrics.rows import RowMetric

HERE = "tests.training.test_places"
LIGHTNING = "lightning.pytorch.callbacks"


class Faulty(Callback):
    """Raises an error of a kind in a hook."""

    def __init__(self, hook: str, kind: str = "ZeroDivisionError") -> None:
        error = {"KeyError": KeyError("x"), "RuntimeError": RuntimeError("two\nlines")}.get(kind, ZeroDivisionError("division"))

        def fail(*_: Any, **__: Any) -> None:
            raise error

        setattr(self, hook, fail)


class CannotBeMade(Callback):
    """Has a fault in its constructor."""

    def __init__(self) -> None:
        raise KeyError("nothing")


class WrongSignature(Callback):
    """Has a hook that takes too little."""

    def on_train_batch_end(self, trainer: Trainer) -> None:  # type: ignore[override]
        pass


class LogsInTheWrongPlace(Callback):
    """Logs where Lightning allows no logging."""

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.log("x", 1.0)


class FaultyMetric(Metric):
    """Fails where it is told to."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def update(self, outputs: Any, batch: Any) -> None:
        if self.where == "update":
            raise IndexError("list index out of range")
        if self.where == "row":
            raise UserError("", "no answer", "one", row=1)

    def compute(self) -> Any:
        return [1, 2] if self.where == "compute" else 0.0


class NoRow(RowMetric):
    """Counts the rows of a kind that there is none of."""

    def __init__(self) -> None:
        super().__init__(kinds=["unseen"])

    def _records_of(self, outputs: Any, batch: Any) -> Any:
        return ([1] for _ in self.chosen(batch))


class FaultyLogger(CSVLogger):
    """Loses its server."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise ConnectionError("no server")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    tree = toy_parts.toy_experiment()
    tree["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}
    toy_parts.write_yaml(tmp_path / "toy.yaml", tree)
    return "toy.yaml"


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def node(target: str, **arguments: Any) -> str:
    return json.dumps({"_target_": target, **arguments})


CALLBACKS = [
    (node(f"{LIGHTNING}.EarlyStopping", monitor="val/nothing"), "Early stopping conditioned on metric `val/nothing`", True),
    (node(f"{LIGHTNING}.ModelCheckpoint", monitor="val/nothing"), "`ModelCheckpoint(monitor='val/nothing')` could not find", True),
    (node(f"{HERE}.Faulty", hook="on_train_batch_end"), "ZeroDivisionError: division", False),
    (node(f"{HERE}.Faulty", hook="on_validation_end", kind="KeyError"), "KeyError: 'x'", True),
    (node(f"{HERE}.Faulty", hook="on_before_zero_grad", kind="RuntimeError"), "two lines", False),
    (node(f"{HERE}.Faulty", hook="setup"), "ZeroDivisionError: division", False),
    (node(f"{HERE}.Faulty", hook="state_dict"), "ZeroDivisionError: division", False),
    (node(f"{HERE}.WrongSignature"), "WrongSignature.on_train_batch_end() takes 2 positional arguments but 6 were given", False),
    (node(f"{HERE}.LogsInTheWrongPlace"), "You can't `self.log()`", True),
]


@pytest.mark.parametrize(("callback", "expected", "kept"), CALLBACKS)
def test_a_callbacks_own_error_is_one_line_with_its_place(file, capsys, callback, expected, kept):
    assert main([file, f"callbacks.mine={callback}"]) == 2
    *_, error, advice = ["", *capsys.readouterr().err.splitlines(), *([""] if "setup" in callback else [])]
    assert error.startswith(f"error: toy.yaml: callbacks.mine: {expected}") and "--traceback" in error
    assert advice.endswith("is kept; continue from it with ckpt=last") == kept


@pytest.mark.parametrize(("monitor", "notes"), [("val/nothing", 1), ("val/loss", 0), ("train/loss", 0)])
def test_the_check_notes_a_score_that_no_metric_gives(file, capsys, monitor, notes):
    assert main([file, "--check", f"callbacks.mine={node(f'{LIGHTNING}.EarlyStopping', monitor=monitor)}"]) == 0
    expected = "note: callbacks.mine monitors 'val/nothing', which nothing logs unless the method does (val/loss, train/loss)"
    assert capsys.readouterr().err.count(expected) == notes


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (node(f"{LIGHTNING}.EarlyStopping", monitor="val/loss", mode="up"), "MisconfigurationException: `mode` can be min, max"),
        (node(f"{LIGHTNING}.ModelCheckpoint", save_top_k=-2), "MisconfigurationException: Invalid value for save_top_k=-2"),
        (node(f"{HERE}.CannotBeMade"), "KeyError: 'nothing'"),
    ],
)
def test_a_callback_that_cannot_be_made_is_one_line_with_its_place(file, capsys, callback, expected):
    error = error_of(capsys, file, f"callbacks.mine={callback}")
    assert error.startswith("error: toy.yaml: callbacks.mine: ") and expected in error


def test_a_checkpoint_that_a_callback_cannot_write_is_named_by_it(file, capsys):
    callback = node(f"{LIGHTNING}.ModelCheckpoint", monitor="val/loss", dirpath="/proc/nothing")
    error = error_of(capsys, file, f"callbacks.mine={callback}")
    assert error.startswith("error: toy.yaml: callbacks.mine: /proc/nothing/") and "could not be written" in error


def test_a_learning_rate_monitor_without_a_logger_is_named(file, capsys):
    argv = [file, f"callbacks.rate={node(f'{LIGHTNING}.LearningRateMonitor')}", "trainer.logger=false"]
    assert error_of(capsys, *argv).startswith("error: toy.yaml: callbacks.rate: Cannot use `LearningRateMonitor` callback")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("update", "metrics.mine: IndexError: list index out of range"),
        ("compute", "metrics.mine: float() argument must be"),
        ("row", "metrics.mine: s00001: found no answer, expected one"),
    ],
)
def test_a_metrics_own_error_is_one_line_with_its_place(file, capsys, where, expected):
    error = error_of(capsys, file, f"metrics.mine={node(f'{HERE}.FaultyMetric', where=where)}")
    assert error.startswith(f"error: toy.yaml: {expected}")


def test_a_loggers_own_error_is_one_line_with_its_place(file, capsys):
    loggers = json.dumps([{"_target_": f"{HERE}.FaultyLogger", "save_dir": "logged"}])
    assert error_of(capsys, file, f"trainer.logger={loggers}").startswith("error: toy.yaml: trainer.logger.0: no server")


def test_an_error_of_the_method_stays_a_bug(file, monkeypatch):
    monkeypatch.setattr(toy_parts.Toy, "validation_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([file])


def recorded(name: str) -> tuple[Any, str]:
    """The value of ``val/unseen`` and its note in a file of strict JSON."""
    report = json.loads(Path("runs/toy", name).read_text(), parse_constant=pytest.fail)
    return report["metrics"]["val/unseen"], report["notes"]["val/unseen"]


def test_a_metric_that_counted_no_row_says_so_everywhere(file, capsys):
    assert main([file, f"metrics.unseen={node(f'{HERE}.NoRow')}"]) == 0
    assert "unseen" in (printed := capsys.readouterr().out) and "nan (no row counted)" in printed
    assert recorded("metrics.json") == (None, "nan: no row was counted")
    assert evaluate(["runs/toy", "--trust", "toy_parts", "--trust", "tests"]) == 0
    assert "nan (no row counted)" in capsys.readouterr().out
    assert recorded("evaluation-1.json") == (None, "nan: no row was counted")


def test_why_a_run_was_stopped_early_is_said(file, capsys):
    stop = node(f"{LIGHTNING}.EarlyStopping", monitor="val/loss", stopping_threshold=1e9)
    assert main([file, f"callbacks.stop={stop}"]) == 0
    assert "stopped early at step 2: Stopping threshold reached: val/loss = " in capsys.readouterr().out
    assert yaml.safe_load(Path("runs/toy/metrics.json").read_text())["steps"] == 2
