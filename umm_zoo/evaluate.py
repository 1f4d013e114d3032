"""``python -m umm_zoo.evaluate RUN [SUITE] [key=value …]``: scores of a finished run, on its own validation shards or on others."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from umm_zoo.benchmarks import SUITES
from umm_zoo.checkpoints.plain_files import strict_json, write_whole, writing
from umm_zoo.errors import UserError, did_you_mean, say, several, user_errors
from umm_zoo.training.finished_run import add_raw_weights, add_trust, load_run
from umm_zoo.training.ranks import ending_together, is_main_process
from umm_zoo.training.report import circumstances, recorded
from umm_zoo.training.run_folder import runs_folder

HELP = """examples:
  python -m umm_zoo.evaluate runs/llava                                   the run's own validation shards
  python -m umm_zoo.evaluate runs/llava data.val.photos.shards=/data/test  other shards
  python -m umm_zoo.evaluate runs/llava trainer.limit_val_batches=10       a part of them
  python -m umm_zoo.evaluate runs/uae/toy/stage2 unified-bench images [encoders.yaml]   caption, reconstruct, compare

The method is rebuilt from the experiment inside the checkpoint; key=value changes it. Scores are printed and written to
evaluation-<n>.json in the run folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m umm_zoo.evaluate",
        description="Score a finished run.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder or a checkpoint")
    parser.add_argument("words", nargs="*", metavar="SUITE | key=value", help=f"what to score ({', '.join(SUITES)}) and overrides")
    add_trust(parser)
    add_raw_weights(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error line comes from")
    arguments = parser.parse_intermixed_args(argv)
    with user_errors(arguments.traceback) as outcome, ending_together(runs_folder(), arguments.traceback):
        overrides = [word for word in arguments.words if "=" in word]
        suite, *rest = [word for word in arguments.words if "=" not in word] or ["validation"]
        evaluate(arguments.run, suite, rest, overrides, arguments.trust, arguments.raw_weights)
    return outcome.code


def evaluate(
    source: str | Path,
    suite: str = "validation",
    words: Sequence[str] = (),
    overrides: Sequence[str] = (),
    trust: Sequence[str] = (),
    raw_weights: bool = False,
) -> Path:
    """Score a run, print the table, and return the file that was written.

    Args:
        source: run folder or checkpoint.
        suite: name in ``umm_zoo.benchmarks.SUITES``.
        words: arguments of the suite.
        overrides: ``key=value`` over the experiment of the run.
        trust, raw_weights: see ``load_run``.

    Raises:
        UserError: no such run or suite, or an override that does not fit.
    """
    several("words", words)
    if suite not in SUITES:
        raise UserError(source, f"an unknown suite '{suite}'", ", ".join(SUITES), did_you_mean(suite, SUITES))
    run = load_run(source, overrides, trust, raw_weights)
    began = time.monotonic()
    scores = {name: float(value) for name, value in SUITES[suite](run, words).items()}
    report = {
        "run": run.experiment.name,
        "suite": suite,
        "step": run.checkpoint.get("global_step"),
        "weights": run.weights,
        "arguments": list(words),
        "overrides": list(overrides),
        "seconds": round(time.monotonic() - began, 2),
        **recorded(scores),
        **circumstances(),
    }
    taken = [path.stem.partition("-")[2] for path in run.path.glob("evaluation-*.json")]
    number = 1 + max((int(text) for text in taken if text.isdecimal()), default=0)  # a user's own copies have other names
    file = run.path / f"evaluation-{number}.json"
    if is_main_process():
        from umm_zoo.callbacks.metrics import print_scores

        print_scores(f"{run.experiment.name}, step {report['step']}, {suite}", scores)  # first: scoring may have taken hours
        with writing(run.path, "a run folder that can be written"):
            write_whole(file, strict_json(report, indent=2) + "\n")
        say(f"written to {file}")
    return file


if __name__ == "__main__":
    sys.exit(main())
