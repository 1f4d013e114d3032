"""Runs of a comparison: those that have finished, a training process for each of the others, and the rows of results."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, RLock
from typing import IO, TYPE_CHECKING, Any

from umm_zoo.comparison.plan import Plan, Step
from umm_zoo.comparison.rule import rule_status
from umm_zoo.errors import USER_ERROR, Problem, UserError, did_you_mean, printable
from umm_zoo.training.ranks import PARENT, answering
from umm_zoo.training.run_folder import RunFolder, few

if TYPE_CHECKING:
    from umm_zoo.comparison.results import Results


class Children:
    """Training processes that are running at the moment; once ``stopped``, no more start.

    Each starts in a session of its own, so that the terminal's Ctrl-C does not reach it a second time; ``stop`` sends SIGTERM, on
    which ``umm_zoo.fit`` saves and ends. It does so by itself where the comparison has ended without a word.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = RLock()  # a signal handler may interrupt the thread that holds it

    def call(self, command: Sequence[str], log: IO[Any], environment: Mapping[str, str]) -> int:
        """Run a command to its end; returns its exit code, that of SIGTERM where it was not even started."""
        with self._lock:
            if self.stopped:
                return 128 + signal.SIGTERM
            environment = {**environment, PARENT: str(os.getpid())}
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
            self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)

    def stop(self) -> None:
        """Let every process save and end, and start no more."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()


def made_runs(runs: Path, own: str) -> dict[str, str]:
    """Finished runs of all comparisons, identity -> name, those of the comparison ``own`` before others of the same identity.

    A folder that was moved or copied holds a run of another name and is left alone.
    """
    found: dict[str, str] = {}
    for path in sorted(runs.glob("compare/*/*"), key=lambda path: (path.parent.name == own, path)):
        name, folder = path.relative_to(runs).as_posix(), RunFolder(path)
        if folder.finished() and folder.stored_name() == name:
            found[path.name.rpartition("-")[2]] = name
    return found


def log_file(step: Step, runs: Path) -> Path:
    """Printed lines of the training process of a step."""
    return RunFolder.of(step.experiment, runs).path.with_suffix(".log")


def finished(step: Step, runs: Path) -> bool:
    """Whether the step's run folder holds this very experiment, trained to its end."""
    folder = RunFolder.of(step.experiment, runs)
    if not folder.finished() or outdated(step, runs):
        return False
    # what it stands on is part of its identity, wherever that was made; variables have gone into the rest
    return all(key.split(".")[0] in ("after", "vars") for key in folder.differences(step.experiment))


def outdated(step: Step, runs: Path) -> list[str]:
    """The user's modules that have changed since the step's run, or that of a step it stands on, was made with them."""
    below = [] if step.below is None else outdated(step.below, runs)
    stages = [stage.experiment for stage in step.stages()]
    return sorted({*below, *RunFolder.of(step.experiment, runs).changed_code(step.experiment, stages)})


def refuse_outdated(plan: Plan, runs: Path) -> None:
    """Refuse to go on with runs that other code has made.

    Raises:
        UserError: names the runs and the modules.
    """
    problems = [
        Problem(str(runs / step.experiment.name), f"a run of other code (changed since: {few(changed)})", "--again to run it again")
        for step in plan.steps()
        if (changed := outdated(step, runs))
    ]
    if problems:
        raise UserError(plan.file, problems)


@dataclass(frozen=True)
class Failure:
    """Step that has failed, with the line that it ended with; one without a line was never started."""

    step: Step
    line: str = ""


def run_plan(plan: Plan, runs: Path, jobs: int, children: Children) -> list[Failure]:
    """Run what has not been run, ``jobs`` at a time, a process each; returns the steps that failed or were not run.

    A user error that ends a run before its training began has nothing to do with the seed: no other run of its choice is
    started. Elsewhere that takes two runs of one choice that end with the same line; where those of two choices do, nothing more
    is started.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    steps = plan.steps()
    done = {step.identity: Event() for step in steps}
    again = {step.identity for step in steps if outdated(step, runs)}
    failed: dict[str, Failure] = {}
    users = {step.identity: {run.choice for run in plan.runs if step in run.steps} for step in steps}
    lines: dict[str, set[str]] = {}  # line -> choices of which a run ended with it
    hopeless: set[str] = set()
    everyone = {run.choice for run in plan.runs}
    scored = {run.steps[-1].identity: run.choice for run in plan.runs}
    known: dict[str, set[str]] = {}  # choice -> names of the scores that a run of it has made
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns) as progress,
        answering((signal.SIGINT, signal.SIGTERM), lambda *_: children.stop()),
        ThreadPoolExecutor(jobs) as pool,
    ):
        task = progress.add_task(printable(plan.name), total=len(steps))

        def refuse_without_score(step: Step) -> None:
            if step.identity in scored:
                known.setdefault(scored[step.identity], set()).update(_scores(step, runs))
                if known.keys() >= everyone and (line := _without_score(plan, set().union(*known.values()))):
                    failed[step.identity] = Failure(step, line)
                    hopeless.update(everyone)

        def work(step: Step) -> None:
            try:
                if step.below is not None:
                    done[step.below.identity].wait()  # submitted earlier, so it runs or has run: no deadlock
                    if step.below.identity in failed:
                        failed[step.identity] = Failure(step, f"it comes after {step.below.experiment.name}, which did not finish")
                        return
                if step.identity not in again and finished(step, runs):
                    refuse_without_score(step)
                    return
                progress.update(task, description=printable(f"{plan.name}: {step.label}"))
                if children.stopped or users[step.identity] <= hopeless:
                    failed[step.identity] = Failure(step)
                elif code := _train(step, runs, jobs > 1, children, step.identity in again):
                    failed[step.identity] = Failure(step, line := last_line(step, runs))
                    if code == USER_ERROR and not RunFolder.of(step.experiment, runs).began():
                        hopeless.update(users[step.identity])
                    before = lines.setdefault(_kind(line, step), set())
                    if before and not children.stopped:
                        common = before | users[step.identity]
                        hopeless.update(common if len(common) == 1 else everyone)
                    before |= users[step.identity]
                else:
                    refuse_without_score(step)
            finally:
                done[step.identity].set()
                progress.advance(task)

        for future in [pool.submit(work, step) for step in steps]:
            future.result()
    return [failed[step.identity] for step in steps if step.identity in failed]


def _scores(step: Step, runs: Path) -> Mapping[str, Any]:
    """What the report of a finished run holds, by name."""
    report = json.loads(RunFolder.of(step.experiment, runs).metrics_file.read_text(encoding="utf-8"))
    return dict(report["metrics"])


def _without_score(plan: Plan, known: Iterable[str]) -> str:
    """A line for a score that no choice has made; choices may differ in what they score."""
    names = sorted(known)
    for printed, (key, _) in plan.metrics.items():
        if key not in names:
            hint = f"; {guess}" if (guess := did_you_mean(key, names)) else ""
            return f"metrics.{printed}: found '{key}', expected one of {', '.join(names)}{hint}"
    return ""


def last_line(step: Step, runs: Path) -> str:
    """The line with which the training of a step has ended: its first error since it began, or else the last that it printed."""
    text = log_file(step, runs).read_text(encoding="utf-8", errors="replace")
    said = [line.strip() for line in re.split(r"^# \d{4}-", text, flags=re.M)[-1].splitlines()[1:] if line.strip()]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return (errors or said[-1:] or ["it said nothing"])[0]


def _kind(line: str, step: Step) -> str:
    """A line without what tells one run from another."""
    return line.replace(step.experiment.name, "").replace(str(step.experiment.seed), "")


def _train(step: Step, runs: Path, single_thread: bool, children: Children, again: bool = False) -> int:
    """Let ``fit`` train a step in a process of its own; returns its exit code."""
    experiment, folder = step.experiment, RunFolder.of(step.experiment, runs)
    after = str(runs / step.below.experiment.name) if step.below else experiment.after
    if after is not None:  # a path in a file is relative to that file
        experiment = replace(experiment, after=str(Path(after).resolve()))
    file = folder.path.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(experiment.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "umm_zoo.fit", str(file), "--runs", str(runs)]
    if again:
        command.append("--again")
    elif folder.checkpoints.newest() is not None:  # a folder is known by its content: an unfinished run in it is this one, stopped
        command.append("ckpt=last")
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([*experiment.folders, *filter(None, [environment.get("PYTHONPATH")])])
    if single_thread:
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log_file(step, runs).open("a", encoding="utf-8") as log:
        log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n")
        log.flush()
        return children.call(command, log, environment) or int(not finished(step, runs))  # 0 and unfinished: its time was up


def collect(plan: Plan, runs: Path, failures: Sequence[Failure] = ()) -> Results | None:
    """A row for every finished run, and what has become of the others; None while none has finished or failed."""
    from umm_zoo.comparison.results import Results, Row, Unfinished

    rows, reports, unfinished = [], [], []
    lines = {failure.step.identity: failure.line for failure in failures}
    for run in plan.runs:
        step = run.steps[-1]
        if finished(step, runs):
            report = json.loads(RunFolder.of(step.experiment, runs).metrics_file.read_text())
            costs = {key: float(value) for key, value in report.get("costs", {}).items()}
            rows.append(Row(run.choice, run.seed, report["metrics"], costs, step.experiment.name, step.identity))
            reports.append(report)
        elif step.identity in lines:
            line = next((lines[other.identity] for other in run.steps if lines.get(other.identity)), "")
            unfinished.append(Unfinished(run.choice, run.seed, line))
    if not rows and not any(other.line for other in unfinished):
        return None
    provenance = {
        "command": f"python -m umm_zoo.compare {plan.file}",
        "commit": _distinct(str(report["commit"]) for report in reports),
        "seeds": ", ".join(str(seed) for seed in dict.fromkeys(row.seed for row in rows)),
        "machine": _distinct(_listed(report["machine"]) for report in reports),
        "rule": rule_status(Path(plan.file), plan.decision, (str(report["commit"]) for report in reports)),
        "versions": _distinct(_listed(report["versions"]) for report in reports),
    }
    order = list(dict.fromkeys(run.choice for run in plan.runs))
    contrasts = list(plan.contrasts)
    return Results(plan.name, plan.question, plan.file, plan.metrics, rows, provenance, plan.decision, contrasts, unfinished, order)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _distinct(values: Iterable[str]) -> str:
    """Circumstances of the runs, every different value once: an interrupted comparison may go on elsewhere."""
    return "; ".join(dict.fromkeys(values))
