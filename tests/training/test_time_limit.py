"""``trainer.max_time`` stops a run, which then goes on as if it had not been stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import toy_parts
import yaml
from lightning.pytorch.callbacks import Timer

from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.fit import main

STOPPED = "the time of trainer.max_time, 0:01:00, is used up; saved runs/toy/checkpoints/step-00000003.ckpt; ckpt=last"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An experiment each of whose steps takes twenty seconds of the timer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, *_: self._offset + 20 * len(lines("losses.txt")[self.begun :]))
    monkeypatch.setattr(Timer, "begun", 0, raising=False)
    monkeypatch.setattr(Timer, "load_state_dict", loaded)
    tree = toy_parts.toy_experiment()
    tree["callbacks"] = {"losses": {"_target_": "toy_parts.Losses", "file": "losses.txt"}}
    tree["trainer"] |= {"max_steps": 6}
    toy_parts.write_yaml(tmp_path / "toy.yaml", tree)
    return "toy.yaml"


def loaded(timer: Timer, state: dict[str, dict[str, int]]) -> None:
    timer._offset, timer.begun = state["time_elapsed"]["train"], len(lines("losses.txt"))  # type: ignore[attr-defined]


def lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def test_a_run_whose_time_is_up_has_not_finished_and_goes_on_exactly(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file, "name=whole"]) == 0
    whole = lines("losses.txt")
    Path("losses.txt").unlink()
    for more in ([], ["ckpt=last"]):  # the same time again is used up at once
        assert main([file, "trainer.max_time=00:00:01:00", *more]) == 0
        assert f"stopped at step 3: {STOPPED}" in capsys.readouterr().out and not Path("runs/toy/metrics.json").exists()
    assert [path.name for path in sorted(Path("runs/toy/checkpoints").glob("*.ckpt"))] == [
        "step-00000002.ckpt",
        "step-00000003.ckpt",
    ]
    assert main([file, "trainer.max_time=00:01:00:00", "ckpt=last"]) == 0
    assert lines("losses.txt") == whole and json.loads(Path("runs/toy/metrics.json").read_text())["steps"] == 6
    states = [load_checkpoint(f"runs/{name}")["state_dict"] for name in ("whole", "toy")]
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_time_that_ends_with_the_last_step_ends_nothing(file: str) -> None:
    assert main([file, "trainer.max_time=00:00:02:00"]) == 0
    assert Path("runs/toy/metrics.json").is_file()


def test_time_ends_between_whole_steps(file: str) -> None:
    assert main([file, "trainer.max_time=00:00:01:00", "trainer.accumulate_grad_batches=2"]) == 0
    assert len(lines("losses.txt")) == 4 and load_checkpoint("runs/toy")["global_step"] == 2


def test_a_later_stage_does_not_start_from_one_whose_time_was_up(file: str) -> None:
    Path("first.yaml").write_text("base: toy.yaml\ntrainer: {max_time: '00:00:01:00'}")
    Path("second.yaml").write_text("base: toy.yaml\nafter: first.yaml")
    assert main(["second.yaml"]) == 0
    assert Path("runs/first/checkpoints/step-00000003.ckpt").is_file() and not Path("runs/second").exists()


def test_early_stopping_ends_a_run_that_has_finished(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    early = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss", "stopping_threshold": 1e9}
    assert main([file, f"callbacks.early={json.dumps(early)}"]) == 0
    assert "stopped early at step 2: Stopping threshold reached: val/loss" in capsys.readouterr().out
    assert json.loads(Path("runs/toy/metrics.json").read_text())["steps"] == 2


def test_own_checkpoints_under_the_key_checkpoint_come_beside_the_last_one(file: str) -> None:
    own = {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "best", "monitor": "val/loss"}
    assert main([file, f"callbacks.checkpoint={json.dumps(own)}"]) == 0
    assert len(list(Path("best").glob("*.ckpt"))) == 1 and load_checkpoint("runs/toy")["global_step"] == 6
    assert yaml.safe_load(Path("runs/toy/experiment.yaml").read_text())["callbacks"]["checkpoint"] == own


@pytest.mark.parametrize("kind", ["simple", "advanced"])
def test_a_profile_stands_among_the_logs(kind: str, file: str) -> None:
    assert main([file, f"trainer.profiler={kind}", "trainer.max_steps=2"]) == 0
    (profile,) = Path("runs/toy/logs").glob("fit-profile*.txt")
    assert "run_training_batch" in profile.read_text()


def test_a_run_without_logs_and_checkpoints_is_scored(file: str) -> None:
    assert main([file, "trainer.logger=false", "trainer.enable_checkpointing=false"]) == 0
    assert json.loads(Path("runs/toy/metrics.json").read_text())["metrics"]["val/loss"] > 0
    assert main([file, "ckpt=runs/toy/checkpoints", "seed=4"]) == 2
