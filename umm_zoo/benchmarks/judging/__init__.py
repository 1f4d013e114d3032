"""Judges, and the benchmarks whose verdicts are a judge's."""
