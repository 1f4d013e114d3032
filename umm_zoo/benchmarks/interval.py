"""Interval of a score over the items of a benchmark: the bootstrap, item by item within each group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

#: Drawings of items, and the part of them inside the interval.
DRAWINGS, INSIDE = 1000, 0.95


def interval(
    values_of: Callable[[Tensor], Mapping[str, Tensor]], records: Tensor, units: Sequence[str], kinds: Sequence[str], name: str
) -> tuple[float, float]:
    """Ends of the percentile interval of the score ``name``.

    Units (items with all that was made of them) are drawn with replacement, as many of each kind as there are; what varies with
    training or with the seeds of generation is not in it.

    Reference: Efron and Tibshirani, 1993, An Introduction to the Bootstrap, chapter 13.

    Args:
        values_of: scores of records.
        records: ``[rows, width]``.
        units, kinds: of each row.
        name: of the score.
    """
    rows: dict[str, list[int]] = {}
    by_kind: dict[str, list[str]] = {}
    for row, (unit, kind) in enumerate(zip(units, kinds, strict=True)):
        if unit not in rows:
            by_kind.setdefault(kind, []).append(unit)
        rows.setdefault(unit, []).append(row)
    generator = np.random.default_rng(0)
    found = []
    for _ in range(DRAWINGS):
        drawn = [own[place] for own in by_kind.values() for place in generator.integers(len(own), size=len(own))]
        found.append(float(values_of(records[[row for unit in drawn for row in rows[unit]]])[name]))
    if np.isnan(found).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(found, [(1 - INSIDE) / 2, (1 + INSIDE) / 2])
    return float(low), float(high)
