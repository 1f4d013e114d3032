"""Benchmarks of finished runs, by their names on the command line of ``python -m umm_zoo.evaluate``."""

#: Dotted path of each class; one's own is named by its path.
BENCHMARKS: dict[str, str] = {
    "unified-bench": "umm_zoo.benchmarks.unified_bench.UnifiedBench",
}
