"""``python -m umm_zoo.compare``: what runs, what does not run twice, and what becomes of failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy_parts
import yaml
from nursery import Nursery

from umm_zoo import compare
from umm_zoo.comparison import run
from umm_zoo.comparison.plan import load_plan
from umm_zoo.comparison.results import Results
from umm_zoo.comparison.run import Children
from umm_zoo.experiment.file import load_experiment
from umm_zoo.fit import main as fit
from umm_zoo.training.run_folder import RunFolder

COMPARE: dict[str, Any] = {
    "question": "Does dropout hurt?",
    "base": "toy.yaml",
    "vary": "method.body.dropout",
    "choices": {"with": {"value": 0.5}, "without": {"value": 0.0}},
    "seeds": [4],
    "metrics": {"loss": {"key": "val/loss", "better": "lower"}},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    toy_parts.write_yaml(tmp_path / "toy.yaml", toy_parts.toy_experiment())
    toy_parts.write_yaml(tmp_path / "dropout.yaml", COMPARE)
    return tmp_path


def two_stages(folder: Path, name: str = "dropout", base: str = "later", after: str = "toy", **changes: Any) -> None:
    """The compare file ``name`` over a second stage ``base`` that comes after another."""
    toy_parts.write_yaml(folder / f"{base}.yaml", {"base": "toy.yaml", "after": f"{after}.yaml"})
    toy_parts.write_yaml(folder / f"{name}.yaml", {**COMPARE, "base": f"{base}.yaml", **changes})


class Inline:
    """A pool that runs what is submitted at once: training listens for signals, which only the main thread may."""

    def __init__(self, workers: int) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs ``fit`` in this process; the arguments it was given."""
    calls: list[list[str]] = []

    def call(self: Children, command: list[str], log: Any, environment: dict[str, str]) -> int:
        assert command[1:3] == ["-m", "umm_zoo.fit"]
        calls.append(command[3:])
        return fit(command[3:])

    monkeypatch.setattr(run, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(Children, "call", call)
    return calls


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Writes what ``fit`` would, with val/loss = dropout, and fails where the method's bias is 7; names in the order they ended."""
    ended: list[str] = []

    def call(self: Children, command: list[str], log: Any, environment: dict[str, str]) -> int:
        experiment = load_experiment(command[3])
        if experiment.after is not None:
            assert RunFolder(experiment.after).finished()
        failed = experiment.method.get("bias") == 7
        if not failed:
            found = RunFolder.of(experiment, command[5])
            found.begin(experiment)
            report = {"commit": "abc", "machine": {"cpus": len(ended)}, "versions": {"torch": "2"}}
            found.finish(experiment, {**report, "metrics": {"val/loss": float(experiment.method["body"]["dropout"])}})
        ended.append(f"{experiment.name} threads={environment.get('OMP_NUM_THREADS')}")
        return int(failed)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(Children, "call", call)
    return ended


def test_every_choice_is_trained_once_and_tabled(folder: Path, trained: list[list[str]]) -> None:
    assert compare.main(["dropout.yaml"]) == 0
    assert len(trained) == 2
    runs = sorted((folder / "runs" / "compare" / "dropout").glob("*/metrics.json"))
    losses = {json.loads(run.read_text())["metrics"]["val/loss"] for run in runs}
    rows = json.loads((folder / "results" / "dropout.json").read_text())["rows"]
    assert len(losses) == 2 and {row["metrics"]["val/loss"] for row in rows} == losses
    written = {path.name for path in (folder / "results").iterdir()}
    assert written == {"dropout.md", "dropout.csv", "dropout.json", "dropout.png", "dropout.tex", "dropout.html"}
    assert compare.main(["dropout.yaml"]) == 0
    assert len(trained) == 2  # the second call trained nothing


def test_a_new_choice_runs_alone(folder: Path, pretended: list[str]) -> None:
    assert compare.main(["dropout.yaml"]) == 0
    more = {**COMPARE, "choices": {**COMPARE["choices"], "much": {"value": 0.75}}}
    toy_parts.write_yaml(folder / "dropout.yaml", more)
    assert compare.main(["dropout.yaml"]) == 0
    assert len(pretended) == 3 and "much-seed4" in pretended[-1]
    provenance = json.loads((folder / "results" / "dropout.json").read_text())["provenance"]
    assert (provenance["commit"], provenance["machine"]) == ("abc", "cpus 0; cpus 1; cpus 2")


def test_what_another_comparison_has_run_is_not_run_again(folder: Path, pretended: list[str]) -> None:
    two_stages(folder)
    assert compare.main(["dropout.yaml"]) == 0 and len(pretended) == 3
    other = {"with, renamed": {"value": 0.5}, "quarter": {"value": 0.25}}
    two_stages(folder, "other", choices=other)
    assert compare.main(["other.yaml"]) == 0
    assert len(pretended) == 4 and "other/quarter-seed4" in pretended[-1]
    rows = json.loads((folder / "results" / "other.json").read_text())["rows"]
    assert {row["choice"]: row["metrics"]["val/loss"] for row in rows} == {"with, renamed": 0.5, "quarter": 0.25}


def test_an_arm_of_another_comparison_serves_as_an_earlier_stage(folder: Path, pretended: list[str]) -> None:
    two_stages(folder)
    assert compare.main(["dropout.yaml"]) == 0 and len(pretended) == 3
    toy_parts.write_yaml(folder / "half.yaml", {"base": "later.yaml", "after": "toy.yaml", "method": {"body": {"dropout": 0.5}}})
    toy_parts.write_yaml(folder / "last.yaml", {"base": "half.yaml", "after": "half.yaml"})
    toy_parts.write_yaml(folder / "deeper.yaml", {**COMPARE, "base": "last.yaml"})
    assert compare.main(["deeper.yaml"]) == 0
    assert len(pretended) == 5 and all("deeper/" in name for name in pretended[3:])


def test_its_own_runs_come_first_wherever_the_earlier_stage_was_made(folder: Path, pretended: list[str]) -> None:
    toy_parts.write_yaml(folder / "again.yaml", {"base": "toy.yaml"})  # the same first stage by another name
    two_stages(folder)
    two_stages(folder, "zdropout", "zlater", "again")
    for name in ("zdropout", "dropout"):  # each in a folder of its own, as if run at the same time
        assert compare.main([f"{name}.yaml", "--runs", f"runs-{name}"]) == 0
    for path in (folder / "runs-zdropout" / "compare").iterdir():
        path.rename(folder / "runs-dropout" / "compare" / path.name)
    assert len(pretended) == 6
    assert compare.main(["dropout.yaml", "--runs", "runs-dropout"]) == 0 and len(pretended) == 6
    rows = json.loads((folder / "results" / "dropout.json").read_text())["rows"]
    assert all(row["run"].startswith("compare/dropout/") for row in rows)


def test_a_folder_that_was_moved_is_left_alone(folder: Path, pretended: list[str]) -> None:
    assert compare.main(["dropout.yaml"]) == 0 and len(pretended) == 2
    moved = (folder / "runs" / "compare" / "dropout").rename(folder / "runs" / "compare" / "old")
    before = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    assert compare.main(["dropout.yaml"]) == 0 and len(pretended) == 4
    assert {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()} == before


def test_an_interrupted_run_goes_on_from_its_checkpoint(folder: Path, trained: list[list[str]]) -> None:
    assert compare.main(["dropout.yaml"]) == 0
    one = next((folder / "runs" / "compare" / "dropout").glob("with-*/metrics.json"))
    whole = json.loads(one.read_text())["metrics"]
    one.unlink()
    assert compare.main(["dropout.yaml"]) == 0
    assert len(trained) == 3 and trained[-1][-1] == "ckpt=last"
    assert json.loads(one.read_text())["steps"] == 4 and set(whole) >= {"val/loss"}


def test_stages_in_order_with_several_jobs(folder: Path, pretended: list[str]) -> None:
    two_stages(folder, seeds=[4, 5])
    assert compare.main(["dropout.yaml", "--jobs", "3", "--runs", str(folder / "elsewhere")]) == 0
    assert len(pretended) == 6  # the first stage once per seed; that it came first is asserted where it is needed
    assert all(name.endswith("threads=1") for name in pretended)
    assert compare.main(["dropout.yaml", "--runs", str(folder / "elsewhere")]) == 0
    assert len(pretended) == 6


def test_a_failure_is_named_and_what_stands_on_it_is_not_run(
    folder: Path, pretended: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = toy_parts.toy_experiment()
    bad["method"]["bias"] = 7
    toy_parts.write_yaml(folder / "bad.yaml", bad)
    toy_parts.write_yaml(folder / "good.yaml", toy_parts.toy_experiment())
    for stage in ("bad", "good"):
        tree = {"base": "toy.yaml", "after": f"{stage}.yaml"}
        toy_parts.write_yaml(folder / f"on_{stage}.yaml", tree)
    choices = {"bad": {"experiment": "on_bad.yaml"}, "good": {"experiment": "on_good.yaml"}}
    toy_parts.write_yaml(folder / "dropout.yaml", {**COMPARE, "choices": choices, "also": ["method.bias"]})
    assert compare.main(["dropout.yaml"]) == 1
    assert len(pretended) == 3 and not any("/bad-seed4-" in name and "on_" in name for name in pretended)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2 and all("failed; see runs/compare/dropout/bad-seed4-" in line for line in lines)
    rows = json.loads((folder / "results" / "dropout.json").read_text())["rows"]
    assert [row["choice"] for row in rows] == ["good"]


@pytest.mark.processes
def test_sigterm_lets_the_running_process_save_and_starts_no_other(nursery: Nursery, folder: Path) -> None:
    toy = toy_parts.toy_experiment()
    toy["trainer"]["max_steps"] = 10**7  # never comes to its end by itself
    toy_parts.write_yaml(folder / "toy.yaml", toy)
    places = f"{Path(toy_parts.__file__).parent}:{Path(compare.__file__).parents[1]}"
    command = [nursery.python, "-m", "umm_zoo.compare", "dropout.yaml"]
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/compare/dropout/with-*/logs/metrics.csv")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "the same command goes on from there" in said
    assert list(folder.glob("runs/compare/dropout/with-*/checkpoints/step-*.ckpt"))
    assert not list(folder.glob("runs/compare/dropout/without-*")) and not (folder / "results").exists()


def test_plan_runs_nothing(folder: Path, pretended: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["dropout.yaml", "--plan"]) == 0
    assert "2 runs, 2 trainings in all, 2 still to be run" in capsys.readouterr().out
    assert pretended == [] and not (folder / "runs").exists() and not (folder / "results").exists()


@pytest.mark.processes
def test_the_command_runs_fit_beside_the_file_and_keeps_what_it_said(
    nursery: Nursery, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process, stopped by a user error before it trains: ``beside`` is found, its class is not."""
    (folder / "beside.py").write_text("from torch import nn\n\nclass Body(nn.Identity):\n    pass\n")
    experiment = toy_parts.toy_experiment()
    experiment["method"]["body"] = {"_target_": "beside.Boddy"}
    toy_parts.write_yaml(folder / "toy.yaml", experiment)
    plan = load_plan(folder / "dropout.yaml")
    plan = replace(plan, runs=plan.runs[:1])
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    monkeypatch.setattr(sys, "executable", nursery.python)
    monkeypatch.setenv("PYTHONPATH", str(Path(toy_parts.__file__).parent))
    (failure,) = run.run_plan(plan, Path("runs"), 1, Children())
    assert [failure.step] == plan.steps() and "did you mean 'beside.Body'?" in failure.line
    (log,) = Path("runs").rglob("*.log")
    assert "did you mean 'beside.Body'?" in log.read_text()
    (file,) = Path("runs").rglob("*.yaml")
    assert yaml.safe_load(file.read_text())["seed"] == 4


# -- metrics, failures, edited code --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("val/los", "found 'val/los', which no choice scores, expected val/loss; did you mean 'val/loss'?"),
        ("val/loss/shape", "found 'val/loss/shape', which no choice scores, expected val/loss"),
        ("val/tables", "found 'val/tables', which no choice scores, expected val/loss, val/tables/incomplete, "),
        ("val/tables/sinlge", "val/tables/single; did you mean 'val/tables/single'?"),
        ("val/kinds/overal", "expected val/loss, val/kinds/overall, val/kinds/*; did you mean 'val/kinds/overall'?"),
        ("val/kinds", "found 'val/kinds', which no choice scores"),
    ],
)
def test_a_metric_that_does_not_exist_is_found_before_anything_trains(
    key: str, line: str, folder: Path, pretended: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = toy_parts.toy_experiment()
    named = {"tables": "PairedAccuracy", "kinds": "AnswerAccuracy"}
    experiment["metrics"] |= {name: {"_target_": f"umm_zoo.metrics.{kind}"} for name, kind in named.items() if name in key}
    toy_parts.write_yaml(folder / "toy.yaml", experiment)
    toy_parts.write_yaml(folder / "dropout.yaml", {**COMPARE, "metrics": {"printed": key}})
    assert compare.main(["dropout.yaml"]) == 2 and pretended == []
    error = capsys.readouterr().err
    assert error.startswith(f"error: dropout.yaml: metrics.printed: found '{key}'") and line in error


def test_a_choice_without_one_of_the_scores_is_named_and_runs(
    folder: Path, pretended: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {"_target_": "umm_zoo.metrics.AnswerAccuracy"}
    choices = {"plain": {"value": 0.0}, "asked": {"set": {"method.body.dropout": 0.5, "metrics.kinds": kinds}}}
    compared = {
        **COMPARE,
        "choices": choices,
        "also": ["metrics.kinds"],
        "metrics": {"printed": "val/kinds/overall", "loss": "val/loss"},
    }
    toy_parts.write_yaml(folder / "dropout.yaml", compared)
    assert compare.main(["dropout.yaml", "--plan"]) == 0
    assert capsys.readouterr().err == "note: metrics.printed: not scored by plain: '-' in the tables\n"


def test_a_score_of_training_that_no_choice_makes_ends_the_comparison(
    folder: Path, pretended: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    toy_parts.write_yaml(folder / "dropout.yaml", {**COMPARE, "metrics": {"printed": "train/los"}, "seeds": [4, 5]})
    assert compare.main(["dropout.yaml"]) == 1 and len(pretended) == 2  # one seed of each
    error = capsys.readouterr().err
    assert "metrics.printed: found 'train/los', expected one of val/loss" in error
    assert "note: 2 steps were not started" in error


FAILING = {"bad": {"set": {"method.bias": 7}}, "good": {"value": 0.25}, "fine": {"value": 0.0}}


def test_a_choice_that_failed_stands_in_the_tables_with_its_line(folder: Path, pretended: list[str]) -> None:
    toy_parts.write_yaml(folder / "dropout.yaml", {**COMPARE, "choices": FAILING, "also": ["method.bias"]})
    assert compare.main(["dropout.yaml"]) == 1
    text = (folder / "results" / "dropout.md").read_text()
    assert "| bad | 0, 1 failed | - |" in text and "| good | 1 | 0.250 (n=1) |" in text
    assert "- bad, seed 4: failed: it said nothing" in text and "| good | - |" in text  # no difference to a choice without scores
    assert "bad,4,,failed: it said nothing," in (folder / "results" / "dropout.csv").read_text()
    record = Results.read(folder / "results" / "dropout.json")
    assert record.choices() == ["bad", "good", "fine"] and record.unfinished[0].line == "it said nothing"


def test_two_failures_of_one_choice_stop_its_rest_alone(
    folder: Path, pretended: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {"choices": FAILING, "also": ["method.bias"], "seeds": [4, 5, 6, 7]}
    toy_parts.write_yaml(folder / "dropout.yaml", {**COMPARE, **changed})
    assert compare.main(["dropout.yaml"]) == 1
    assert [sum(f"/{name}-seed" in line for line in pretended) for name in FAILING] == [2, 4, 4]
    assert "note: 2 steps were not started, for what ended others would end them too" in capsys.readouterr().err
    assert "| bad | 0, 2 failed, 2 not run | - |" in (folder / "results" / "dropout.md").read_text()


def test_a_users_mistake_before_the_training_stops_its_choice_at_once(
    folder: Path, trained: list[list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    choices = {"bad": {"value": 1.5}, "good": {"value": 0.0}}  # torch refuses a dropout of 1.5 when it is built
    toy_parts.write_yaml(folder / "dropout.yaml", {**COMPARE, "choices": choices, "seeds": [4, 5, 6]})
    assert compare.main(["dropout.yaml"]) == 1
    assert [sum(f"/{name}-seed" in call[0] for call in trained) for name in choices] == [1, 3]
    assert "note: 2 steps were not started" in capfd.readouterr().err


def test_a_mistake_that_shows_in_training_may_be_that_of_one_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def call(self: Children, command: list[str], log: Any, environment: dict[str, str]) -> int:
        experiment = load_experiment(command[3])
        RunFolder.of(experiment, command[5]).begin(experiment, [{"commit": "abc"}])  # as at the first step
        started.append(experiment.name)
        log.write(f"error: loss: nan at step {len(started)}\n")
        log.flush()
        return 2

    monkeypatch.setattr(Children, "call", call)
    toy_parts.write_yaml(folder / "dropout.yaml", {**COMPARE, "seeds": [4, 5]})
    assert compare.main(["dropout.yaml"]) == 1
    assert len(started) == 4  # no two of them ended with one line


def test_one_failure_of_two_choices_stops_everything(
    folder: Path, pretended: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    toy_parts.write_yaml(folder / "dropout.yaml", {**COMPARE, "set": {"method.bias": 7}, "seeds": [4, 5]})
    assert compare.main(["dropout.yaml"]) == 1 and len(pretended) == 2
    assert "note: 2 steps were not started" in capsys.readouterr().err
    assert "| with | 0, 1 failed, 1 not run | - |" in (folder / "results" / "dropout.md").read_text()


def test_a_value_replaces_what_stands_there_whatever_its_class(folder: Path) -> None:
    same, other = {"_target_": "toy_parts.Head", "in_dim": 3}, {"_target_": "toy_parts.OtherHead", "in_dim": 3}
    experiment = toy_parts.toy_experiment()
    experiment["method"]["head"] |= {"kind": "squared"}
    toy_parts.write_yaml(folder / "toy.yaml", experiment)
    choices = {"same": {"value": same}, "other": {"value": other}, "set": {"set": {"method.head.in_dim": 3}}}
    toy_parts.write_yaml(folder / "heads.yaml", {**COMPARE, "vary": "method.head", "choices": choices})
    heads = {planned.choice: planned.steps[-1].experiment.method["head"] for planned in load_plan("heads.yaml").runs}
    assert heads == {"same": same, "other": other, "set": {**same, "kind": "squared"}}


def test_scores_that_are_not_finite_are_left_out_and_said(folder: Path, pretended: list[str]) -> None:
    toy_parts.write_yaml(folder / "dropout.yaml", {**COMPARE, "seeds": [4, 5]})
    assert compare.main(["dropout.yaml"]) == 0
    file = sorted((folder / "runs" / "compare" / "dropout").glob("with-seed5*/metrics.json"))[0]
    file.write_text(file.read_text().replace("0.5", "NaN"))  # as earlier versions wrote it
    assert compare.main(["dropout.yaml"]) == 0
    assert "| with | 2 | 0.500 (n=1) (no row counted at seed 5) |" in (folder / "results" / "dropout.md").read_text()
    json.loads((folder / "results" / "dropout.json").read_text(), parse_constant=pytest.fail)


def test_edited_code_asks_for_again(
    folder: Path, trained: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "my_bodies.py").write_text("from toy_parts import Body\n\n\nclass MyBody(Body):\n    pass\n")
    monkeypatch.syspath_prepend(folder)
    experiment = toy_parts.toy_experiment()
    experiment["method"]["body"]["_target_"] = "my_bodies.MyBody"
    toy_parts.write_yaml(folder / "toy.yaml", experiment)
    assert compare.main(["dropout.yaml"]) == 0 and len(trained) == 2
    with (folder / "my_bodies.py").open("a") as stream:
        stream.write("# edited\n")
    assert compare.main(["dropout.yaml"]) == 2 and len(trained) == 2
    error = capsys.readouterr().err
    assert error.count("found a run of other code (changed since: my_bodies), expected --again to run it again") == 2
    assert compare.main(["dropout.yaml", "--again"]) == 0 and len(trained) == 4
    assert compare.main(["dropout.yaml"]) == 0 and len(trained) == 4


def test_what_stands_on_edited_code_is_run_again_though_its_stage_was_interrupted_in_between(
    folder: Path, trained: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "my_augment.py").write_text("from lightning import Callback\n\n\nclass Nothing(Callback):\n    pass\n")
    monkeypatch.syspath_prepend(folder)
    two_stages(folder)
    toy = toy_parts.toy_experiment()
    toy["callbacks"] = {"own": {"_target_": "my_augment.Nothing"}}  # of the first stage alone
    toy_parts.write_yaml(folder / "first.yaml", toy)
    toy_parts.write_yaml(folder / "later.yaml", {"base": "toy.yaml", "after": "first.yaml"})
    assert compare.main(["dropout.yaml"]) == 0 and len(trained) == 3
    with (folder / "my_augment.py").open("a") as stream:
        stream.write("# edited\n")
    with monkeypatch.context() as stopped:
        stopped.setattr(Children, "call", lambda self, command, *_: fit(command[3:]) if "first" in command[3] else 143)
        assert compare.main(["dropout.yaml", "--again"]) == 1
    (first,) = (folder / "runs/compare/dropout").glob("first-*/metrics.json")  # trained again with the edited code
    assert compare.main(["dropout.yaml"]) == 2
    assert capsys.readouterr().err.count("a run of other code (changed since: my_augment)") == 2
    assert compare.main(["dropout.yaml", "--again"]) == 0 and first.exists()
    assert compare.main(["dropout.yaml", "--plan"]) == 0 and " 0 still to be run" in capsys.readouterr().out


@pytest.mark.processes
def test_a_killed_comparison_leaves_no_training(nursery: Nursery, folder: Path) -> None:
    toy = toy_parts.toy_experiment()
    toy["trainer"]["max_steps"] = 10**7
    toy_parts.write_yaml(folder / "toy.yaml", toy)
    places = f"{Path(toy_parts.__file__).parent}:{Path(compare.__file__).parents[1]}"
    command = [nursery.python, "-m", "umm_zoo.compare", "dropout.yaml"]
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=environment)
    deadline = time.monotonic() + 120
    while not (locks := list(folder.glob("runs/compare/dropout/with-*/logs/metrics.csv"))) and time.monotonic() < deadline:
        time.sleep(0.2)
    lock = locks[0].parents[1] / "lock"
    child = json.loads(lock.read_text())["pid"]
    process.kill()
    process.wait()
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists() and not lock.exists()
    assert list(lock.parent.glob("checkpoints/step-*.ckpt"))  # it has saved, too
