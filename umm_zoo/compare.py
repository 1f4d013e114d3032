"""``python -m umm_zoo.compare FILE``: one block varied under one recipe, several seeds, a table with intervals."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from umm_zoo.comparison.page import write_comparison_page
from umm_zoo.comparison.plan import Plan, Step, load_plan, refuse_unknown_metrics
from umm_zoo.comparison.run import Children, collect, finished, log_file, made_runs, refuse_outdated, run_plan
from umm_zoo.errors import UserError, say, user_errors
from umm_zoo.experiment.shipped import PREFIX, located
from umm_zoo.training.run_folder import runs_folder

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

A 'value' replaces whatever stands at the varied path, of the same class or of another; 'set' changes single arguments.
It is refused when anything else differs between the choices. What a choice sets below vars, seed and where it runs
(trainer.accelerator, devices, num_nodes, strategy) also hold for the stages that it comes after, as with fit; the rest
is the scored stage's own. A run is known by its resolved experiment:
what has been run, for this comparison or for another in the same folder of runs, is not run again, unless the source of
your own classes has changed since: that is refused, and --again runs it again.
Ctrl-C and SIGTERM stop and save what is running; the same command goes on from there."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 done, 1 a run failed, 2 a user error in the compare file, 130 stopped."""
    arguments = _parser().parse_args(argv)
    with user_errors() as outcome:
        if arguments.jobs < 1:
            raise UserError("--jobs", f"{arguments.jobs}", "1 or more")
        runs, file = runs_folder(arguments.runs), located(arguments.file)
        beside = Path() if arguments.file.startswith(PREFIX) else file.parent
        plan = load_plan(file, made_runs(runs, file.stem))
        refuse_unknown_metrics(plan)
        if not arguments.again:
            refuse_outdated(plan, runs)
        waiting = [step for step in plan.steps() if not finished(step, runs)]
        say(f"{plan.name}: {len(plan.runs)} runs, {len(plan.steps())} trainings in all, {len(waiting)} still to be run")
        if arguments.plan:
            _print_plan(plan, waiting, runs)
            return 0
        children = Children()
        failed = run_plan(plan, runs, arguments.jobs, children)
        if children.stopped:
            outcome.code = 128 + signal.SIGINT
            print("stopped; what was running has been saved, the same command goes on from there", file=sys.stderr)
        elif failed:
            outcome.code = 1
            for step, line in ((run.step, run.line) for run in failed if run.line):
                say(f"error: {runs / step.experiment.name}: failed; see {log_file(step, runs)}: {line}", stderr=True)
            if rest := [run for run in failed if not run.line]:
                say(f"note: {len(rest)} steps were not started, for what ended others would end them too", stderr=True)
        if results := collect(plan, runs, [] if children.stopped else failed):
            paths = results.write(Path(arguments.out) if arguments.out else beside / "results")
            paths.append(write_comparison_page(results, paths[0].with_suffix(".html"), runs))
            print(paths[0].read_text())
            say(f"written: {', '.join(str(path) for path in paths)}")
    return outcome.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m umm_zoo.compare",
        description="Benchmark blocks against each other under one recipe.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="compare file (YAML)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time, one thread each if above 1")
    parser.add_argument("--runs", metavar="DIR", help="folder of the run folders (default: $UMM_ZOO_RUNS, else runs)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the results (default: results/ beside FILE, here for one that ships)",
    )
    parser.add_argument("--again", action="store_true", help="run again what was run with other code of yours than it has now")
    parser.add_argument("--plan", action="store_true", help="check, say what would run, and stop")
    return parser


def _print_plan(plan: Plan, waiting: list[Step], runs: Path) -> None:
    lines = [f"  {'waiting ' if step in waiting else 'finished'} {runs / step.experiment.name}" for step in plan.steps()]
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; what is still in the buffer must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
