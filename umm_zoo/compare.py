"""``python -m umm_zoo.compare FILE``: one block varied under one recipe, several seeds, a table with intervals."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

from umm_zoo.comparison.children import Children
from umm_zoo.comparison.plan import Plan, Step, load_plan
from umm_zoo.errors import user_errors
from umm_zoo.training.run_folder import RunFolder

HELP = """A compare file names a question, a base experiment, the one path that varies, its choices, seeds and metrics:

  question: Do noisy queries beat learned ones?
  decision: "supported" when the paired difference is above 0 by two standard errors
  base: ../wemmu/stage3.yaml
  vary: method.queries
  also: [method.detail]          # further paths that may differ
  choices:
    learned: {value: {_target_: umm_zoo.blocks.queries.LearnedQueries, num_queries: 16}}
    noisy: {value: {_target_: umm_zoo.blocks.queries.NoisyQueries}}
    other: {experiment: other.yaml, set: {method.detail: null}}
  contrasts: [[other, noisy]]    # paired differences to be tabled besides those to the first choice
  seeds: [0, 1, 2]
  metrics: {edit success: val/edit/success, loss: {key: val/loss, better: lower}}
  set: {trainer.max_steps: 1000} # applied to every choice

It is refused when anything else differs between the choices. A run is known by its resolved experiment:
what has been run, for this comparison or for another in the same folder of runs, is not run again.
Ctrl-C and SIGTERM stop and save what is running; the same command goes on from there."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 done, 1 a run failed, 2 a mistake in the compare file, 130 stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m umm_zoo.compare",
        description="Benchmark blocks against each other under one recipe.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="compare file (YAML)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time, one thread each if above 1")
    parser.add_argument("--runs", metavar="DIR", help="folder of the run folders (default: $UMM_ZOO_RUNS, else runs)")
    parser.add_argument("--out", metavar="DIR", help="folder of the results (default: results/ beside FILE)")
    parser.add_argument("--plan", action="store_true", help="check, say what would run, and stop")
    arguments = parser.parse_args(argv)
    with user_errors() as outcome:
        runs = Path(arguments.runs or os.environ.get("UMM_ZOO_RUNS") or "runs")
        plan = load_plan(arguments.file, _made(runs, Path(arguments.file).stem))
        waiting = [step for step in plan.steps() if not _finished(step, runs)]
        print(f"{plan.name}: {len(plan.runs)} runs, {len(plan.steps())} training steps in all, {len(waiting)} still to be run")
        if arguments.plan:
            lines = [f"  {'waiting ' if step in waiting else 'finished'} {_folder(step, runs)}" for step in plan.steps()]
            try:
                print("\n".join(lines), flush=True)
            except BrokenPipeError:  # `| head` has seen enough; what is still in the buffer must go somewhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        children = Children()
        failed = run_plan(plan, runs, arguments.jobs, children)
        for step in [] if children.stopped else failed:
            print(f"error: {_folder(step, runs)}: failed; see {_log(step, runs)}", file=sys.stderr)
        outcome.code = 128 + signal.SIGINT if children.stopped else int(bool(failed))
        if children.stopped:
            print("stopped; what was running has been saved, the same command goes on from there", file=sys.stderr)
        paths = write_results(plan, runs, Path(arguments.out) if arguments.out else Path(arguments.file).parent / "results")
        if paths:
            print(paths[0].read_text())
            print(f"written: {', '.join(str(path) for path in paths)}")
    return outcome.code


def _made(runs: Path, own: str) -> dict[str, str]:
    """Finished runs of all comparisons, identity -> name, those of the comparison ``own`` before others of the same identity.

    A folder that was moved or copied holds a run of another name and is left alone.
    """
    found: dict[str, str] = {}
    for path in sorted(runs.glob("compare/*/*"), key=lambda path: (path.parent.name == own, path)):
        name, folder = path.relative_to(runs).as_posix(), RunFolder(path)
        if folder.finished() and folder.stored_name() == name:
            found[path.name.rpartition("-")[2]] = name
    return found


def run_plan(plan: Plan, runs: Path, jobs: int, children: Children) -> list[Step]:
    """Run what has not been run, ``jobs`` at a time, a process each; returns the steps that failed or were stopped."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    steps = plan.steps()
    done = {step.identity: Event() for step in steps}
    failed: list[Step] = []
    before = {run.steps[i].identity: run.steps[i - 1] for run in plan.runs for i in range(1, len(run.steps))}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, children.stopped_by_signals(), ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task(plan.name, total=len(steps))

        def work(step: Step) -> None:
            try:
                if (below := before.get(step.identity)) is not None:
                    done[below.identity].wait()  # submitted earlier, so it runs or has run: no deadlock
                    if below in failed:
                        failed.append(step)
                        return
                if not _finished(step, runs):
                    progress.update(task, description=f"{plan.name}: {step.label}")
                    if children.stopped or _run(step, runs, jobs > 1, children) != 0:
                        failed.append(step)
            finally:
                done[step.identity].set()
                progress.advance(task)

        for future in [pool.submit(work, step) for step in steps]:
            future.result()
    return failed


def _folder(step: Step, runs: Path) -> Path:
    return runs / step.experiment.name


def _log(step: Step, runs: Path) -> Path:
    return _folder(step, runs).with_suffix(".log")


def _placed(step: Step, runs: Path) -> Any:
    """The step's experiment with ``after`` as the run folder that the earlier step writes."""
    after = step.experiment.after
    if after is not None and after.startswith("compare/"):
        after = str(runs / after)
    return replace(step.experiment, after=after)


def _finished(step: Step, runs: Path) -> bool:
    folder = RunFolder(_folder(step, runs))
    different = folder.differences(_placed(step, runs)) if folder.finished() else ["all"]
    # what it stands on is part of its identity, wherever that was made; variables have gone into the rest
    return all(key == "after" or key.split(".")[0] == "vars" for key in different)


def _run(step: Step, runs: Path, single_thread: bool, children: Children) -> int:
    experiment, folder = _placed(step, runs), _folder(step, runs)
    file = folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    # the folder is known by its content, so an unfinished run in it is the same run, interrupted
    tree = experiment.to_yaml()
    if experiment.after is not None:  # a path in a file is relative to that file
        tree = tree.replace(f"after: {experiment.after}", f"after: {Path(experiment.after).resolve()}")
    file.write_text(tree, encoding="utf-8")
    command = [sys.executable, "-m", "umm_zoo.fit", str(file), "--runs", str(runs)]
    if RunFolder(folder).checkpoints.newest() is not None:
        command.append("ckpt=last")
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([*experiment.folders, *filter(None, [environment.get("PYTHONPATH")])])
    if single_thread:
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with _log(step, runs).open("a", encoding="utf-8") as log:
        log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n")
        log.flush()
        return children.call(command, log, environment)


def write_results(plan: Plan, runs: Path, out: Path) -> list[Path]:
    """Collect every finished run into ``<name>.md/.csv/.json/.png``; none is written while nothing has finished."""
    from umm_zoo.comparison.results import Results, Row

    rows, reports = [], []
    for run in plan.runs:
        step = run.steps[-1]
        if not _finished(step, runs):
            continue
        reports.append(json.loads(RunFolder(_folder(step, runs)).metrics_file.read_text()))
        costs = {key: float(value) for key, value in reports[-1].get("costs", {}).items()}
        rows.append(Row(run.choice, run.seed, reports[-1]["metrics"], costs, step.experiment.name, step.identity))
    if not rows:
        return []
    provenance = {
        "command": f"python -m umm_zoo.compare {plan.file}",
        "commit": _distinct(str(report["commit"]) for report in reports),
        "seeds": ", ".join(str(seed) for seed in dict.fromkeys(row.seed for row in rows)),
        "machine": _distinct(_listed(report["machine"]) for report in reports),
        "versions": _distinct(_listed(report["versions"]) for report in reports),
    }
    contrasts = list(plan.contrasts)
    return Results(plan.name, plan.question, plan.file, plan.metrics, rows, provenance, plan.decision, contrasts).write(out)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _distinct(values: Iterable[str]) -> str:
    """What the runs were made with, every different value once: an interrupted comparison may go on elsewhere."""
    return "; ".join(dict.fromkeys(values))


if __name__ == "__main__":
    sys.exit(main())
