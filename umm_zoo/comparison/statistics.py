"""Means with intervals over seeds, and paired differences, from a table of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t


@dataclass(frozen=True)
class Interval:
    """Mean and the half-width of its 95 % confidence interval (Student's t over seeds); ``half`` is NaN for one seed."""

    mean: float
    half: float
    num: int

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, which the half-width is a quantile of; NaN for one seed."""
        return self.half / float(student_t.ppf(0.975, self.num - 1)) if self.num > 1 else math.nan

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{_digits(self.mean)} (n=1)"
        return f"{_digits(self.mean)} ± {_digits(self.half)}"


def _digits(value: float) -> str:
    if 1e-9 < abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of n values: ``t(.975, n-1) · s / √n`` with the sample standard deviation s."""
    num = len(values)
    if num == 0:
        raise ValueError("interval: no values")
    mean = math.fsum(values) / num
    if num == 1:
        return Interval(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (num - 1)
    return Interval(mean, float(student_t.ppf(0.975, num - 1)) * math.sqrt(variance / num), num)


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


def t_statistic(difference: Interval) -> float:
    """A mean difference in units of its standard error; NaN with one seed, infinite where all seeds agree to the last digit."""
    error = difference.standard_error
    if error == 0:
        return math.copysign(math.inf, difference.mean) if difference.mean else 0.0
    return difference.mean / error


def paired_p_value(difference: Interval) -> float:
    """Two-sided p-value of a paired t-test from the interval of the difference; 1.0 with one seed."""
    statistic = t_statistic(difference)
    return 1.0 if math.isnan(statistic) else float(2 * student_t.sf(abs(statistic), difference.num - 1))
