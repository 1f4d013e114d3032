"""Means with intervals over seeds, and paired differences, from a table of runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """Mean of values, one per seed, and its standard error, which is NaN for one seed."""

    mean: float
    error: float
    num: int

    @property
    def half(self) -> float:
        """Half-width of the 95 % confidence interval (Student's t), ``t(.975, n-1) · error``; NaN for one seed."""
        from scipy.stats import t as student_t  # seconds of a start that few commands need

        return self.error * float(student_t.ppf(0.975, self.num - 1))

    @property
    def t(self) -> float:
        """The mean in units of its standard error; NaN for one seed, infinite where all seeds agree to the last digit."""
        if self.error == 0:
            return math.copysign(math.inf, self.mean) if self.mean else 0.0
        return self.mean / self.error

    @property
    def p_value(self) -> float:
        """Two-sided p-value of a t-test against 0: of a difference of pairs, the paired one. NaN for one seed."""
        from scipy.stats import t as student_t

        return float(2 * student_t.sf(abs(self.t), self.num - 1))

    def __str__(self) -> str:
        spread = "(n=1)" if self.num == 1 else f"± {_digits(self.half)}"
        return f"{_digits(self.mean)} {spread}"


def _digits(value: float) -> str:
    if 1e-9 < abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean of n values, at least one, and its standard error ``s / √n`` with the sample standard deviation s."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Interval(statistics.fmean(values), error, len(values))


def paired_difference(values: dict[int, float], reference: dict[int, float]) -> Interval | None:
    """Interval of ``values - reference`` over the seeds that both have; None without a common seed.

    Both runs of a seed share data order and initial weights, so the difference of a pair has far less spread than the runs.
    """
    seeds = sorted(set(values) & set(reference))
    return interval([values[seed] - reference[seed] for seed in seeds]) if seeds else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a family of p-values (Holm, 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
