"""Trainings started and found again by their folders; nothing is remembered in between."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import toy_parts
from run_folder_files import HOSTILE, write_run_files

from umm_zoo.errors import Problem, UserError
from umm_zoo.play import launching
from umm_zoo.play.cards import training_card
from umm_zoo.play.following import follow, stop, tail, trainings
from umm_zoo.play.launching import (
    PLACE,
    RECORD,
    Plan,
    beside,
    experiment_files,
    fields_of,
    launch,
    launched,
    overrides_of,
    problems_of,
)

#: In place of the command: says what it got and its session, and ends with what it saved when it is asked to.
STAND_IN = f"""
import os, signal, sys, time
print({HOSTILE!r}, sys.argv[1:], os.getsid(0) == os.getpid(), flush=True)
def end(*_): print("saved", flush=True); os._exit(143)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(tmp_path)
    toy_parts.write_yaml(tmp_path / "toy.yaml", toy_parts.toy_experiment())
    return Plan("toy.yaml", ["trainer.max_steps=6"], "my runs")


def wait(for_: Callable[[], bool]) -> None:
    """Wait for something, as long as a very slow machine needs."""
    end = time.monotonic() + 60
    while not for_():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.processes
def test_a_training_is_found_again_by_its_folder_and_stopped(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "FIT", [sys.executable, "-S", "-c", STAND_IN])
    folder = launch(plan)
    assert trainings("my runs") == {"toy": folder} == {"toy": Path("my runs/toy")}
    wait(lambda: "ready" in follow(folder).lines)
    found = follow(folder)
    assert (found.state, found.ours, found.lines[0]) == ("starting", True, f"{HOSTILE} {plan.words} True")
    assert "<script" not in training_card(found, "toy")
    with pytest.raises(UserError, match="a run in progress"):
        launch(plan)
    stop(folder)
    wait(lambda: follow(folder).state == "stopped")
    assert follow(folder).lines[-1] == "saved"
    with pytest.raises(UserError, match="a training that has ended"):
        stop(folder)


def test_the_command_is_the_ordinary_one(plan: Plan) -> None:
    assert shlex.split(plan.line) == ["python", "-m", "umm_zoo.fit", "--runs=my runs", "toy.yaml", "trainer.max_steps=6"]
    assert Plan("a.yaml", resume=True).line == "python -m umm_zoo.fit a.yaml ckpt=last"
    assert Plan("a.yaml", ["-x=1"]).words == ["--", "a.yaml", "-x=1"]


def test_experiments_of_the_folder_and_those_that_ship_are_offered(plan: Plan) -> None:
    Path("compare.yaml").write_text("question: which?\nbase: toy.yaml\nchoices: {}\n")
    Path("experiments/mine").mkdir(parents=True)
    Path("experiments/mine/one.yaml").write_text("base: ../../toy.yaml\n")
    Path("odd.yaml").write_bytes(b"\xff")
    found = experiment_files()
    assert found[:2] == ["toy.yaml", "experiments/mine/one.yaml"] and "umm_zoo:llava/shapes.yaml" in found
    assert not any("compare" in name or "odd" in name for name in found)
    assert fields_of(plan)["trainer.max_steps"] == 6


def test_what_the_checker_says_stands_beside_the_field(plan: Plan) -> None:
    keys = ["trainer.max_steps", "method.x", ""]
    given = overrides_of(keys, ["-1", "3", "4"])
    assert given == ["trainer.max_steps=-1", "method.x=3"]
    assert problems_of(plan) == []
    own, rest = beside(problems_of(Plan("toy.yaml", given[1:])), keys)
    assert "an unknown argument 'x'" in own[1] and own[0] == own[2] == "" and rest == []
    assert beside([Problem("data.source[0].x", "3"), Problem("method.x.y", "4")], keys) == (
        ["", "method.x.y: 4", ""],
        ["data.source[0].x: 3"],
    )


def test_runs_that_others_have_made_are_watched_and_not_stopped(tmp_path: Path) -> None:
    first, second = (write_run_files(tmp_path / name, name, finished=name == "a/done") for name in ("a/done", "b"))
    assert set(trainings(str(tmp_path))) == {"a/done", "b"}
    assert [(follow(run).state, follow(run).steps, follow(run).max_steps) for run in (first, second)] == [
        ("finished", 40, 40),
        ("stopped", 40, 40),
    ]
    with pytest.raises(UserError, match="not started from a page"):
        stop(second)
    (second / PLACE).mkdir()
    (second / PLACE / RECORD).write_text(json.dumps({"process": {"pid": 1}, "command": "x", "output": "../../secret"}))
    assert launched(second) is None and follow(second).ours is False


def test_the_last_lines_are_plain_text(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"first\n  1%\r 50%\r100%\r\n\x1b[31mred\x1b[0m\n\n\xff\nlast")
    assert tail(tmp_path / "out", 4) == ["100%", "\\x1b[31mred\\x1b[0m", "\ufffd", "last"]
    assert tail(tmp_path / "none") == []
