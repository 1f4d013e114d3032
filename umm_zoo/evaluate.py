"""``python -m umm_zoo.evaluate RUN [--benchmark NAME] [key=value …]``: scores of a finished run.

On its validation data, or on a benchmark.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umm_zoo.benchmarks import BENCHMARKS
from umm_zoo.checkpoints.plain_files import strict_json, write_whole, writing
from umm_zoo.errors import UserError, say, several, user_errors
from umm_zoo.training.finished_run import FinishedRun, add_raw_weights, add_trust, load_run
from umm_zoo.training.ranks import ending_together, is_main_process
from umm_zoo.training.report import circumstances, recorded
from umm_zoo.training.run_folder import runs_folder

HELP = """examples:
  python -m umm_zoo.evaluate runs/llava                                   the run's own validation shards
  python -m umm_zoo.evaluate runs/llava data.val.photos.shards=/data/test  other shards
  python -m umm_zoo.evaluate runs/llava trainer.limit_val_batches=10       a part of them
  python -m umm_zoo.evaluate runs/uae/toy/stage2 --benchmark unified-bench images=photos   a benchmark, with its settings
  torchrun --nproc-per-node 4 -m umm_zoo.evaluate runs/wemmu --benchmark geneval guidance=4  the same over processes

The method is rebuilt from the experiment inside the checkpoint; key=value changes it. Of its callbacks those take part that scores
depend on, and those that a key names (callbacks.samples.num_samples=24 writes sample cards). Scores are printed and written to
evaluation-<n>.json in the run folder; of a benchmark every image, verdict and a page are kept below benchmarks/NAME there, and a
command that was stopped goes on."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m umm_zoo.evaluate",
        description="Score a finished run.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder or a checkpoint")
    words = "overrides of the experiment; settings of the benchmark, or a YAML file of them"
    parser.add_argument("words", nargs="*", metavar="key=value", help=words)
    parser.add_argument("--benchmark", metavar="NAME", help=f"{', '.join(BENCHMARKS)}, or the path of a class of yours")
    add_trust(parser)
    add_raw_weights(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error line comes from")
    arguments = parser.parse_intermixed_args(argv)
    with user_errors(arguments.traceback) as outcome, ending_together(runs_folder(), arguments.traceback):
        evaluate(arguments.run, arguments.words, arguments.benchmark, arguments.trust, arguments.raw_weights)
    return outcome.code


def evaluate(
    source: str | Path,
    words: Sequence[str] = (),
    benchmark: str | None = None,
    trust: Sequence[str] = (),
    raw_weights: bool = False,
) -> Path:
    """Score a run, print the table, and return the file that was written.

    Args:
        source: run folder or checkpoint.
        words: ``key=value`` over the experiment of the run, and settings of the benchmark.
        benchmark: name in ``umm_zoo.benchmarks.BENCHMARKS``, or the path of a class; None is the run's own validation.
        trust, raw_weights: see ``load_run``.

    Raises:
        UserError: no such run or benchmark, or a word that does not fit.
    """
    several("words", words)
    began = time.monotonic()
    if benchmark is None:
        if plain := [word for word in words if "=" not in word]:
            named = f"--benchmark {plain[0]}" if plain[0] in BENCHMARKS else ""
            raise UserError(source, f"'{plain[0]}' behind the run", "key=value", named and f"a benchmark is {named}")
        run = load_run(source, words, trust, raw_weights)
        found: Mapping[str, Any]
        what, found = "validation", recorded(_validation(run))
    else:
        run, what, found = _on_benchmark(source, words, benchmark, trust, raw_weights)
    report: dict[str, Any] = {
        "run": run.experiment.name,
        "suite": what,
        "step": run.checkpoint.get("global_step"),
        "weights": run.weights,
        "overrides": list(words),
        "seconds": round(time.monotonic() - began, 2),
        **found,
        **circumstances(),
    }
    taken = [path.stem.partition("-")[2] for path in run.path.glob("evaluation-*.json")]
    number = 1 + max((int(text) for text in taken if text.isdecimal()), default=0)  # a user's own copies have other names
    file = run.path / f"evaluation-{number}.json"
    if is_main_process():
        from umm_zoo.callbacks.metrics import print_scores

        scores = {name: float("nan") if value is None else value for name, value in report["metrics"].items()}
        print_scores(f"{run.experiment.name}, step {report['step']}, {what}", scores)  # first: scoring may have taken hours
        with writing(run.path, "a run folder that can be written"):
            write_whole(file, strict_json(report, indent=2) + "\n")
        say(f"written to {file}")
    return file


def _validation(run: FinishedRun) -> dict[str, float]:
    from umm_zoo.training.validation import validate

    return validate(run)


def _on_benchmark(
    source: str | Path, words: Sequence[str], name: str, trust: Sequence[str], raw_weights: bool
) -> tuple[FinishedRun, str, Mapping[str, Any]]:
    """The run, the benchmark's name, and its scores with their card's folder."""
    from umm_zoo.benchmarks.building import build_benchmark, sort_words
    from umm_zoo.benchmarks.running import run_benchmark

    sorted_words = sort_words(name, words)
    run = load_run(source, sorted_words.overrides, trust, raw_weights)
    found = build_benchmark(sorted_words, run.experiment)
    card = run_benchmark(run, found, sorted_words.given, sorted_words.overrides)
    kept = {key: card[key] for key in ("interval", "overlap", "warnings", "folder") if key in card}
    scores: dict[str, Any] = dict(recorded(card.get("scores", {})))
    return run, found.name, scores | kept


if __name__ == "__main__":
    sys.exit(main())
