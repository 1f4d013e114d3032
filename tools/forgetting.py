"""Costs of later stages of a curriculum to earlier tasks: every score after each stage, and its change from best to last.

    python tools/forgetting.py runs/wemmu/toy/stage2 runs/wemmu/toy/stage3 runs/wemmu/toy/stage4 [--metrics geneval edits]

Scores are those of each run's ``metrics.json``, which every run writes when it ends; ``python -m umm_zoo.evaluate`` scores a run on
other data. A score that a stage did not measure is left empty. ``forgotten`` is the highest score of any earlier stage minus that
of the last one: positive is a loss. Scores for which lower is better (copy_index, flow, perplexity) are turned round.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from umm_zoo.errors import UserError, locating, user_errors

LOWER_IS_BETTER = ("copy_index", "flow", "loss", "frechet", "/extra", "perplexity")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, in the order of the stages")
    made.add_argument("--metrics", nargs="+", default=[], metavar="NAME", help="only scores whose name contains one of these")
    options = made.parse_args(arguments)
    with user_errors() as outcome:
        print(table({run.name: scores_of(run) for run in options.runs}, options.metrics))
    return outcome.code


def scores_of(run: Path) -> dict[str, float]:
    """The validation scores that a run ended with.

    Raises:
        UserError: the run has no ``metrics.json``, or a damaged one.
    """
    file = run / "metrics.json"
    if not file.is_file():
        raise UserError(file, "no such file", "the folder of a finished run")
    with locating(place=str(file), refusals=(ValueError,)):
        metrics = json.loads(file.read_text(encoding="utf-8"))["metrics"]
    found = {name.removeprefix("val/"): value for name, value in metrics.items() if name.startswith("val/")}
    return {name: float(value) for name, value in found.items() if value is not None}  # null: the metric counted no row


def forgotten(name: str, values: list[float | None]) -> float | None:
    """Best of the earlier stages minus the last; None where either is missing."""
    sign = -1 if any(word in name for word in LOWER_IS_BETTER) else 1
    before = [sign * value for value in values[:-1] if value is not None]
    return None if not before or values[-1] is None else max(before) - sign * values[-1]


def table(stages: dict[str, dict[str, float]], wanted: list[str]) -> str:
    """Markdown, a score per row and a stage per column."""
    names = dict.fromkeys(name for scores in stages.values() for name in scores)
    rows = [f"| score | {' | '.join(stages)} | forgotten |", "|---" * (len(stages) + 2) + "|"]
    for name in names:
        if wanted and not any(word in name for word in wanted):
            continue
        values = [scores.get(name) for scores in stages.values()]
        cells = ["" if value is None else f"{value:.3f}" for value in [*values, forgotten(name, values)]]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
