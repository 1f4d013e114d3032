"""Benchmarks of finished runs, and the suites of ``python -m umm_zoo.evaluate`` by name."""

from collections.abc import Callable, Mapping, Sequence

from umm_zoo.benchmarks.unified_bench import unified_bench
from umm_zoo.training.finished_run import FinishedRun

#: Scores of a run by name; the words are those behind the name of the suite.
Suite = Callable[[FinishedRun, Sequence[str]], Mapping[str, float]]


def validation(run: FinishedRun, words: Sequence[str]) -> Mapping[str, float]:
    """See ``umm_zoo.training.validation``."""
    from umm_zoo.training.validation import validate

    return validate(run, words)


SUITES: dict[str, Suite] = {"validation": validation, "unified-bench": unified_bench}
