"""Checkpoints that are written while training goes on: the same bytes, one copy at most, and no error in silence."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_parts
from lightning import Callback

from umm_zoo import fit
from umm_zoo.checkpoints import output
from umm_zoo.checkpoints.files import AtomicCheckpointIO, load_checkpoint
from umm_zoo.checkpoints.folder import CheckpointFolder
from umm_zoo.errors import UserError


class Gate:
    """Disk that waits before each piece until it is opened, and says when it was reached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached, self.writes = threading.Event(), threading.Event(), 0
        put = output.put

        def waiting(file: Any, piece: memoryview) -> None:
            self.reached.set()
            self.writes += 1
            assert self.opened.wait(120)
            put(file, piece)

        monkeypatch.setattr(output, "put", waiting)


def state(step: int) -> dict[str, Any]:
    weights = torch.arange(30.0).reshape(5, 6)
    tied = {"a": weights, "b": weights, "row": weights[2]}
    return {"state_dict": tied, "global_step": step, "callbacks": {"EMA": {"averages": {"a": weights / 3}}}, "list": [1, (2, "x")]}


def test_the_copy_is_of_the_moment_and_the_bytes_are_those_of_a_plain_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AtomicCheckpointIO().save_checkpoint(state(1), tmp_path / "a.ckpt")
    gate, files, done, live = Gate(monkeypatch), AtomicCheckpointIO(), [], state(1)
    files.begin(live, tmp_path / "b.ckpt", lambda: done.append(1))
    live["state_dict"]["a"].mul_(-1)  # training goes on in place
    live["callbacks"]["EMA"]["averages"].clear()
    assert gate.reached.wait(120) and not (tmp_path / "b.ckpt").exists() and not done
    gate.opened.set()
    files.writer.wait()
    assert (tmp_path / "b.ckpt").read_bytes() == (tmp_path / "a.ckpt").read_bytes() and done == [1]
    with (tmp_path / "plain").open("wb") as file:
        torch.save(state(1), file)
    plain = (tmp_path / "plain").read_bytes()
    assert (tmp_path / "b.ckpt").read_bytes()[: len(plain) - 2] == plain[:-2]  # behind it there is the seal


def test_the_next_save_waits_so_that_there_is_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, files, copies, in_memory = Gate(monkeypatch), AtomicCheckpointIO(), [], output.in_memory
    monkeypatch.setattr("umm_zoo.checkpoints.files.in_memory", lambda value: copies.append(1) or in_memory(value))
    files.begin(state(1), tmp_path / "1.ckpt", lambda: None)
    second = threading.Thread(target=files.begin, args=(state(2), tmp_path / "2.ckpt", lambda: None))
    second.start()
    assert gate.reached.wait(120) and len(copies) == 1
    gate.opened.set()
    second.join(120)
    files.teardown()
    assert len(copies) == 2 and load_checkpoint(tmp_path / "2.ckpt")["global_step"] == 2


def test_what_the_writer_meets_is_raised_where_it_is_next_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, piece: memoryview) -> None:
        raise OSError(28, "No space left on device")

    files = AtomicCheckpointIO()
    monkeypatch.setattr(output, "put", full)
    files.begin(state(1), tmp_path / "1.ckpt", lambda: pytest.fail("it does not stand"))
    with pytest.raises(UserError, match=r"1.ckpt could not be written: no room on the disk"):
        files.begin(state(2), tmp_path / "2.ckpt", lambda: None)
    files.writer.look()  # said once
    assert not list(tmp_path.iterdir())


class Watch(Callback):
    """Opens the gate at a step, having seen that training goes on while the checkpoint of step 3 waits for the disk."""

    gate: Gate | None = None
    at: int = 0
    breaks: int = 100
    seen: list[tuple[int, list[str]]] = []

    def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
        if self.gate is not None and trainer.global_step == self.breaks:
            threading.Timer(0.3, self.gate.opened.set).start()
            raise UserError("", "a long text", "a short one")

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        folder = Path(trainer.default_root_dir) / "checkpoints"
        self.seen.append((trainer.global_step, sorted(path.name for path in folder.glob("step-*"))))
        if self.gate is not None and trainer.global_step == self.at:
            self.gate.opened.set()


def toy(folder: Path, *more: str) -> int:
    toy_parts.write_yaml(folder / "toy.yaml", toy_parts.toy_experiment())
    saving = "callbacks.checkpoint={_target_: umm_zoo.checkpoints.callback.LastCheckpoint, every_n_train_steps: 3}"
    watch = "callbacks.watch={_target_: test_checkpoint_background.Watch}"
    argv = [str(folder / "toy.yaml"), "trainer.max_steps=7", saving, watch, "--runs", str(folder / "runs"), *more]
    return fit.main(argv)


def test_training_goes_on_and_the_end_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "gate", gate := Gate(monkeypatch))
    monkeypatch.setattr(Watch, "at", 5)
    monkeypatch.setattr(Watch, "seen", seen := [])
    assert toy(tmp_path) == 0 and gate.writes == 3
    assert [step for step, _ in seen] == [*range(1, 8)]
    assert all(names in ([], ["step-00000003.ckpt.partial"]) for step, names in seen if step in (4, 5))
    checkpoints = CheckpointFolder(tmp_path / "runs" / "toy" / "checkpoints")
    assert (checkpoints.path / "LATEST").read_text() == "step-00000007.ckpt\nstep-00000006.ckpt\n"
    assert sorted(path.name for path in checkpoints.path.iterdir())[1:] == ["step-00000006.ckpt", "step-00000007.ckpt"]


def test_a_full_disk_ends_the_run_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put, count = output.put, []

    def filling(file: Any, piece: memoryview) -> None:
        count.append(1)
        if len(count) > 1:
            raise OSError(28, "No space left on device")
        put(file, piece)

    monkeypatch.setattr(output, "put", filling)
    monkeypatch.setattr(Watch, "seen", [])
    assert toy(tmp_path) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "step-00000006.ckpt could not be written: no room on the disk" in said
    assert load_checkpoint(tmp_path / "runs" / "toy")["global_step"] == 3


def test_an_error_waits_before_it_says_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Watch, "gate", Gate(monkeypatch))
    monkeypatch.setattr(Watch, "breaks", 4)
    assert toy(tmp_path) == 2
    assert "step-00000003.ckpt is kept; continue from it" in capsys.readouterr().err
    began = time.monotonic()
    (tmp_path / "a.ckpt.partial").touch()
    threading.Timer(0.2, (tmp_path / "a.ckpt.partial").unlink).start()
    CheckpointFolder(tmp_path).wait(patience=120)  # of another rank
    assert 0.2 <= time.monotonic() - began < 60
