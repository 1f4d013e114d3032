"""Benchmarks of finished runs, by their names on the command line of ``python -m umm_zoo.evaluate``."""

#: Dotted path of each class; one's own is named by its path.
BENCHMARKS: dict[str, str] = {
    "geneval": "umm_zoo.benchmarks.geneval.GenEval",
    "mini-geneval": "umm_zoo.benchmarks.geneval.MiniGenEval",
    "unified-bench": "umm_zoo.benchmarks.unified_bench.UnifiedBench",
}
