"""Ends of a command that are neither an error line of its own nor a signal: sys.exit in a callback, names that are no paths."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_parts
from lightning import Callback

from umm_zoo.checkpoints import files
from umm_zoo.checkpoints.files import AtomicCheckpointIO
from umm_zoo.errors import UserError
from umm_zoo.evaluate import main as evaluate
from umm_zoo.fit import main as fit
from umm_zoo.training import lock
from umm_zoo.training.lock import locked

LONG = "a" * 300


class Leaves(Callback):
    """Ends the process, or the run as Ctrl-C twice does."""

    def __init__(self, ctrl_c: bool) -> None:
        self.ctrl_c = ctrl_c

    def on_train_batch_end(self, *_: Any) -> None:
        if self.ctrl_c:
            raise KeyboardInterrupt
        sys.exit(3)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    sys.modules.setdefault(Path(__file__).stem, sys.modules[__name__])
    toy_parts.write_yaml(tmp_path / "toy.yaml", toy_parts.toy_experiment())
    return tmp_path


@pytest.mark.parametrize(("ctrl_c", "code"), [(False, 2), (True, 130)])
def test_a_callback_that_leaves_is_no_signal(ctrl_c: bool, code: int, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = json.dumps({"_target_": f"{Path(__file__).stem}.Leaves", "ctrl_c": ctrl_c})
    assert fit(["toy.yaml", f"callbacks.mine={node}"]) == code
    said = capsys.readouterr().err
    assert ("callbacks.mine: found a call of sys.exit (3)" in said) is not ctrl_c
    assert ("stopped at once by SIGINT" in said) is ctrl_c


@pytest.mark.parametrize(
    "words",
    [[f"{LONG}.yaml"], ["toy.yaml", f"ckpt={LONG}"], ["toy.yaml", f"after={LONG}"], ["toy.yaml", "--check", f"name={LONG}"]],
)
def test_names_that_are_no_paths_are_one_line(words: list[str], toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(words) == 2
    assert capsys.readouterr().err.count("error: ") == 1


@pytest.mark.parametrize("name", [LONG, "loop"])
def test_a_run_of_such_a_name_is_one_line(name: str, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.symlink("loop", "loop")
    assert evaluate([name]) == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_ctrl_c_in_a_write_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(2)}}, tmp_path / "step-1.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_read_says_when_to_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / lock.NAME).write_text("{")
    monkeypatch.setattr(lock, "BEAT", 0.0)
    with pytest.raises(UserError, match=r"does not say whose it is, .*start again in (59|60) s"), locked(tmp_path):
        pass
