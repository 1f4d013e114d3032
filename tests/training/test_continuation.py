"""A run that ended at some moment around a validation goes on to the log and the scores of one that did not."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import toy_parts

from umm_zoo.fit import main

OWN = ("name", "seconds", "resumed_from", "history")
EPOCHS = ("data.train_size=6", "trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=1.0")
STOPPING = "callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, patience: 2, mode: max}"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    toy_parts.write_yaml(tmp_path / "toy.yaml", toy_parts.toy_experiment())
    return "toy.yaml"


def records(name: str) -> tuple[list[dict[str, str]], dict[str, Any]]:
    report = json.loads(Path("runs", name, "metrics.json").read_text())
    with Path("runs", name, "logs", "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream)), {key: value for key, value in report.items() if key not in OWN}


def crash(hook: str, step: int) -> str:
    return f"callbacks.crash={json.dumps({'_target_': 'toy_parts.CrashAt', 'hook': hook, 'step': step})}"


HOOKS = ["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end", "on_train_epoch_end"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("options", [(), EPOCHS])
def test_a_crash_around_a_validation_changes_nothing(hook: str, step: int, options: tuple[str, ...], file: str) -> None:
    argv = [file, "trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=2", *options]
    argv.append("callbacks.checkpoint={_target_: umm_zoo.checkpoints.callback.LastCheckpoint, every_n_train_steps: 3}")
    assert main([*argv, "name=whole"]) == 0
    if hook == "on_train_epoch_end" and not (options or step == 6):
        return  # the epoch does not end
    with pytest.raises(toy_parts.Crash):
        main([*argv, crash(hook, step)])
    assert not Path("runs/toy/metrics.json").exists()
    assert main([*argv, "ckpt=last"]) == 0
    rows, report = records("toy")
    assert (rows, report) == records("whole") and "val/loss" in report["metrics"]
    assert [row["step"] for row in rows if row["val/loss"]] == ["2", "5"]


def test_scores_of_a_validation_before_the_checkpoint_are_those_of_the_report(file: str) -> None:
    argv = [file, "trainer.max_steps=5", "trainer.val_check_interval=2"]
    assert main([*argv, "name=whole"]) == 0
    with pytest.raises(toy_parts.Crash):
        main([*argv, crash("on_train_end", 5)])
    assert main([*argv, "ckpt=last"]) == 0  # the checkpoint of the last step, where no validation is due
    assert records("toy") == records("whole") and "val/loss" in records("toy")[1]["metrics"]


def test_a_signal_within_the_validation_that_is_made_up_for_keeps_the_checkpoint(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([file, "name=whole"]) == 0
    with pytest.raises(toy_parts.Crash):
        main([file, crash("on_validation_start", 2)])
    stopping = {"_target_": "toy_parts.Losses", "file": "x.txt", "signal_at": 2, "in_validation": True}
    assert main([file, "ckpt=last", f"callbacks.stop={json.dumps(stopping)}"]) == 143
    assert "saved runs/toy/checkpoints/step-00000002.ckpt; continue with ckpt=last" in capsys.readouterr().out
    assert main([file, "ckpt=last"]) == 0
    assert records("toy") == records("whole")


def test_a_callback_that_judges_validations_goes_on_where_it_was(file: str) -> None:
    argv = [file, "trainer.max_steps=40", "trainer.val_check_interval=2", STOPPING, "training.optimizer.lr=0.1"]
    assert main([*argv, "name=whole"]) == 0
    whole = records("whole")
    assert whole[1]["steps"] < 40
    with pytest.raises(toy_parts.Crash):
        main([*argv, crash("on_validation_end", 4)])
    assert main([*argv, "ckpt=last"]) == 0
    assert records("toy") == whole


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\n", b"mine,step\n1,x\n", None])
def test_a_damaged_log_never_blocks_the_resume(damage: bytes | None, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file, "name=whole"]) == 0
    with pytest.raises(toy_parts.Crash):
        main([file, crash("on_validation_end", 4)])
    log = Path("runs/toy/logs/metrics.csv")
    log.write_bytes(log.read_bytes()[:-4] if damage is None else damage)
    assert main([file, "ckpt=last"]) == 0
    assert ("damaged lines of runs/toy/logs/metrics.csv now stand in" in capsys.readouterr().err) == (damage != b"")
    assert records("toy")[1] == records("whole")[1] and records("toy")[0][-1]["val/loss"]
    assert damage is not None or records("toy")[0] == records("whole")[0]
